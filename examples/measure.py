"""Measure size, speed and divergence of several formats of one model, and write the table to a file: what
`python -m codecllm.bench` does, from a program.

    pip install '.[transformers]'
    python examples/measure.py /models/TinyLlama-1.1B book.txt table.md
"""

import argparse
import contextlib
from pathlib import Path

from codecllm import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    contenders = "bf16,codecllm-bf16,codecllm-int8,codecllm-rate:5,codecllm-rate:4,codecllm-rate:3"
    command = [arguments.model, "--text", arguments.text, "--contenders", contenders, "--batch", "1,4"]
    with arguments.output.open("w") as file, contextlib.redirect_stdout(file):
        code = bench.main(command)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
