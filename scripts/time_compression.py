#!/usr/bin/env python3
"""Times `codecllm compress`: `int8` and `rate`, with a trellis and without, uncalibrated, in turns on one checkpoint of random weights.

    pip install numpy==2.4.6
    cargo build --release && python3 scripts/time_compression.py [--shape tinyllama-1.1b] [--rounds 3]

Prints JSON: the median seconds of each, and the ratios. The checkpoint (2.2 GB for a billion weights) and one archive at a time lie in a temporary folder.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "tinyllama-1.1b": {"hidden": 2048, "wide": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000},
    "tiny": {"hidden": 256, "wide": 704, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 1000},
}
RATE = ["--format", "rate", "--bits", "4.5"]
FORMATS = {"int8": ["--format", "int8"], "rate": RATE, "trellis": [*RATE, "--trellis"]}


def shapes(hidden: int, wide: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama."""
    kv = hidden // heads * kv_heads
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)
    }  # fmt: skip
    linears = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        found |= {f"{layer}self_attn.{n}_proj.weight": shape for n, shape in linears.items()}
        found |= {f"{layer}mlp.{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
        found |= {f"{layer}mlp.down_proj.weight": (hidden, wide)}
        found |= {f"{layer}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return found


def write_checkpoint(to: Path, shape: dict[str, int]) -> None:
    """Normal weights in rows of different scales, BF16, with the least of a configuration."""
    rng = np.random.default_rng(0)
    header, end = {}, 0
    tensors = shapes(**shape)
    for name, dims in tensors.items():
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end := end + 2 * int(np.prod(dims))]}
    text = json.dumps(header).encode()
    with (to / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in tensors.values():
            rows = rng.standard_normal(dims, np.float32) if len(dims) > 1 else np.ones(dims, np.float32)
            if len(dims) > 1:
                rows *= 0.02 * np.exp(0.3 * rng.standard_normal((dims[0], 1), np.float32))
            bits = rows.view(np.uint32)
            file.write(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape["hidden"],
        "intermediate_size": shape["wide"], "num_hidden_layers": shape["layers"], "vocab_size": shape["vocab"],
        "num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"], "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(config))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codecllm", type=Path, default=ROOT / "target/release/codecllm", help="the program")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, archive = Path(folder) / "checkpoint", Path(folder) / "archive"
        checkpoint.mkdir()
        write_checkpoint(checkpoint, SHAPES[arguments.shape])
        for _ in range(arguments.rounds):
            for name, options in FORMATS.items():
                start = time.perf_counter()
                subprocess.run([arguments.codecllm, "compress", checkpoint, "-o", archive, *options], check=True, stdout=subprocess.DEVNULL)
                seconds[name].append(time.perf_counter() - start)
                shutil.rmtree(archive)
    medians = {name: statistics.median(all_of) for name, all_of in seconds.items()}
    ratios = {f"{name}_to_int8": medians[name] / medians["int8"] for name in ("rate", "trellis")}
    print(json.dumps({"shape": arguments.shape, "seconds": medians, **ratios}, indent=2))


if __name__ == "__main__":
    main()
