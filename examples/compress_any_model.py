"""Compress a model of an architecture that the Rust engine does not run, save it, load it, and compare: here a vision transformer.

    pip install '.[transformers]'
    python examples/compress_any_model.py google/vit-base-patch16-224 /tmp/vit.int8      # a name or a directory
    python examples/compress_any_model.py --random /tmp/vit.int8                         # random weights, no network
"""

import argparse

import torch
from codecllm.torch import compress_model_, compressed_modules
from transformers import ViTConfig, ViTForImageClassification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("output")
    parser.add_argument("--random", action="store_true", help="a small model with random weights")
    parser.add_argument("--format", default="int8", choices=["bf16", "fp8", "int8", "rate"])
    parser.add_argument("--bits", type=float, help="with --format rate")
    arguments = parser.parse_args()
    if arguments.random == (arguments.model is not None):
        parser.error("give a model, or --random")

    if arguments.random:
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(hidden_size=192, intermediate_size=768, num_attention_heads=3))
    else:
        model = ViTForImageClassification.from_pretrained(arguments.model)
    model = model.eval()
    size = model.config.image_size
    pixels = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(pixels).logits
        # Every nn.Linear; the classifier stays as it is.
        compress_model_(model, arguments.format, bits=arguments.bits, skip=["classifier"])
        model.save_pretrained(arguments.output)
        again = ViTForImageClassification.from_pretrained(arguments.output)
        after = again(pixels).logits
    layers = compressed_modules(again).values()
    n_bytes = sum(layer.weight.numel() for layer in layers)
    n_weights = sum(layer.in_features * layer.out_features for layer in layers)
    print(f"{len(layers)} layers, {8 * n_bytes / n_weights:.2f} bits a weight")
    print(f"relative change of the outputs: {(after - before).norm() / before.norm():.2g}")


if __name__ == "__main__":
    main()
