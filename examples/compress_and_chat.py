"""Compress a checkpoint, prove the archive, and talk to the model through Transformers.

    pip install '.[transformers]'
    python examples/compress_and_chat.py /models/Llama-3-8B-Instruct /models/llama.rate --bits 4.5

A second call finds the archive and only talks. An empty line ends the talk.
"""

import argparse
from pathlib import Path

import codecllm
import codecllm.transformers  # noqa: F401  (registers the quantization method)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--bits", type=float, help="bits a weight [default: lossless]")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if not arguments.archive.exists():
        codecllm.compress(
            arguments.checkpoint,
            arguments.archive,
            format="bf16" if arguments.bits is None else "rate",
            bits=arguments.bits,
            prefer="speed" if on_gpu else "balanced",
            progress=lambda done, total, name: print(f"\r{done / max(1, total):4.0%}  {name:60.60}", end=""),
        )
        status = codecllm.verify(arguments.archive, arguments.checkpoint)["status"]
        total = codecllm.inspect(arguments.archive)["total"]
        print(f"\n{status}; {total['bits_per_weight']:.2f} bits a weight, {total['bytes'] / 1e9:.2f} GB")

    tokenizer = AutoTokenizer.from_pretrained(arguments.archive)
    model = AutoModelForCausalLM.from_pretrained(arguments.archive, device_map="auto" if on_gpu else None)
    messages: list[dict[str, str]] = []
    while text := input("> "):
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        else:
            prompt = text  # a base model continues the text
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        inputs.pop("token_type_ids", None)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = model.generate(**inputs, max_new_tokens=arguments.tokens, streamer=streamer)
        answer = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
