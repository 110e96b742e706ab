"""`python -m codecllm.bench`: BF16, other quantizers where they are installed, and ours, in one run on one machine.

Every contender is the same model. Tokens a second are those of one decoding step at a given batch, on a GPU in a CUDA graph; the
contenders take turns, and each figure is the median over the rounds. KLD is the mean KL divergence of the contender's next-token
distributions from those of the BF16 model in nats, over one text: of a model with random weights it says little.

    python -m codecllm.bench /models/Llama-3-8B --text book.txt
    python -m codecllm.bench --shape llama-3-8b --contenders bf16,codecllm-rate:4.5 --batch 1,4,16 --json
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, StaticCache

import codecllm
import codecllm.transformers
from codecllm.torch import compress_model_

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


@dataclass
class Row:
    """One contender at one batch."""

    contender: str
    batch: int
    #: Tokens of all sequences.
    tokens_per_s: float
    step_ms: float
    #: Parameters and buffers.
    weight_bytes: int
    #: Highest of PyTorch's allocator on the GPU, the weights included; none on the CPU.
    peak_bytes: int | None
    #: Bits over the linear layers' weights, all metadata included.
    bits_per_weight: float
    kld: float | None
    graph: bool


class Step:
    """One decoding step of a model: `batch` sequences, whose cache holds `context` tokens already."""

    def __init__(self, model: Any, batch: int, context: int) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        device = next(p for p in model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
        self.cache = StaticCache(config=model.config, max_cache_len=context + 8)
        self.position = torch.arange(context, device=device)
        self.mask: Tensor | None = None
        with torch.inference_mode():
            self._forward(ids, self.position)
        self.ids = ids[:, -1:].clone()
        self.position = torch.tensor([context], device=device)
        # Made here, as making one asks the GPU for its shape, which a graph cannot.
        first: Any = self.cache.layers[0]
        length = first.keys.shape[-2]
        mask = torch.arange(length, device=device) <= context
        self.mask = mask[None, None, None].expand(batch, 1, 1, length)
        # The same step again and again: every layer writes the same place of its cache.
        self._cumulative = [layer.cumulative_length.clone() for layer in self._layers()]

    def _layers(self) -> Iterable[Any]:
        return (layer for layer in self.cache.layers if isinstance(getattr(layer, "cumulative_length", None), Tensor))

    def _forward(self, ids: Tensor, position: Tensor) -> Tensor:
        out = self.model(
            ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            position_ids=position[None],
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits

    def _once(self) -> Tensor:
        for layer, length in zip(self._layers(), getattr(self, "_cumulative", ()), strict=False):
            layer.cumulative_length.copy_(length)
        return self._forward(self.ids, self.position)

    def capture(self) -> None:
        """Record the step as a CUDA graph."""
        with torch.inference_mode():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._once()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.logits = self._once()
            self.graph = graph

    def run(self) -> Tensor:
        """The logits `[batch, 1, vocabulary]`."""
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        with torch.inference_mode():
            return self._once()

    def seconds(self, n: int) -> float:
        """The time of a step, from `n` in a row."""
        sync = torch.cuda.synchronize if self.ids.is_cuda else lambda: None
        sync()
        start = time.perf_counter()
        for _ in range(n):
            self.run()
        sync()
        return (time.perf_counter() - start) / n


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        inner = getattr(tensor, "__tensor_flatten__", None)
        parts = [getattr(tensor, name) for name in inner()[0]] if inner and type(tensor) is not nn.Parameter else [tensor]
        for part in parts:
            if isinstance(part, Tensor) and part.device.type != "meta":
                seen[part.data_ptr()] = part.nbytes
    return sum(seen.values())


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def _torchao(model: nn.Module, config: str) -> None:
    import torchao.quantization as ao

    config_of = {"int8": "Int8WeightOnlyConfig", "int4": "Int4WeightOnlyConfig"}
    ao.quantize_(model, getattr(ao, config_of[config])())


def _bitsandbytes(model: nn.Module, bits: int) -> None:
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
        has_bias, device = linear.bias is not None, linear.weight.device
        layer: Any
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_bias, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(linear.weight.data.half().cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, has_bias, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(device))


def contender(name: str) -> Callable[[nn.Module], None]:
    """What makes a BF16 model the contender `name`."""
    if name == "bf16":
        return lambda model: None
    if name in ("torchao-int8", "torchao-int4"):
        return lambda model: _torchao(model, name.removeprefix("torchao-"))
    if name in ("bnb-int8", "bnb-nf4"):
        return lambda model: _bitsandbytes(model, 8 if name == "bnb-int8" else 4)
    format, _, bits = name.removeprefix("codecllm-").partition(":")
    if name.startswith("codecllm-") and format in ("bf16", "fp8", "int8", "rate"):
        chosen: Any = format

        def compress(model: nn.Module) -> None:
            compress_model_(model, chosen, bits=float(bits) if bits else None, prefer="speed")

        return compress
    known = "bf16, torchao-int8, torchao-int4, bnb-int8, bnb-nf4, codecllm-bf16, codecllm-fp8, codecllm-int8, codecllm-rate:BITS"
    raise ValueError(f"unknown contender `{name}`; expected one of {known}")


def default_contenders(device: torch.device) -> list[str]:
    """All that can run here."""
    names = ["bf16"]
    if device.type == "cuda" and _installed("torchao"):
        names += ["torchao-int8", "torchao-int4"]
    if device.type == "cuda" and _installed("bitsandbytes"):
        names += ["bnb-int8", "bnb-nf4"]
    return [*names, "codecllm-bf16", "codecllm-int8", "codecllm-rate:4.5"]


def load(source: str | None, shape: str, device: torch.device) -> Any:
    """The BF16 model: a checkpoint, or random weights in the shape of a known model, with tails like those of trained ones."""
    if source is not None:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        return model.to(device).eval()
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=8192)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        make: Any = LlamaForCausalLM
        with device:
            model = make(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for module in model.modules():
            if type(module) is nn.Linear:
                # Rows of different scales, and heavier tails than a normal distribution has.
                scale = torch.exp(0.3 * torch.randn(module.out_features, 1, device=device))
                module.weight.mul_((scale * (1 + 0.2 * torch.randn_like(module.weight).abs())).to(module.weight.dtype))
    return model.eval()


def text_ids(model: Any, source: str | None, text: str | None, n: int) -> Tensor:
    """Tokens that the divergence is measured on, `[1, n]`."""
    if text is not None and source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
        ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :n]
    else:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (1, n), generator=generator)
    return ids.to(next(p for p in model.parameters()).device)


@torch.inference_mode()
def log_probs(model: Any, ids: Tensor) -> Tensor:
    """`[n, vocabulary]`, on the host."""
    return torch.log_softmax(model(ids, use_cache=False).logits[0].float(), -1).cpu()


def bits_of_linears(model: nn.Module, n_weights: int, other: int) -> float:
    """Bits over the linear layers' weights: all that the model holds beside what is not theirs."""
    return 8 * (weight_bytes(model) - other) / max(1, n_weights)


def run(arguments: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """All contenders, in turns; and why those that could not be made were not measured."""
    device = torch.device(arguments.device)
    names = arguments.contenders.split(",") if arguments.contenders else default_contenders(device)
    makes = {name: contender(name) for name in names}
    batches = [int(n) for n in arguments.batch.split(",")]
    rows: dict[tuple[str, int], Row] = {}
    model = load(arguments.model, arguments.shape, device)
    # What an embedding shares is no linear layer's alone.
    shared = {m.weight.data_ptr() for m in model.modules() if type(m) is nn.Embedding}
    linear = [m for m in model.modules() if type(m) is nn.Linear and m.weight.data_ptr() not in shared]
    n_weights = sum(m.weight.numel() for m in linear)
    other = weight_bytes(model) - sum(m.weight.nbytes for m in linear)
    del linear
    ids = text_ids(model, arguments.model, arguments.text, arguments.tokens)
    steps: dict[tuple[str, int], Step] = {}
    failed: dict[str, str] = {}
    reference = log_probs(model, ids)
    del model
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        model = load(arguments.model, arguments.shape, device)
        try:
            makes[name](model)
        except (ImportError, RuntimeError) as e:
            # A peer may need more than is installed, or another GPU.
            if name.startswith("codecllm-"):
                raise
            failed[name] = str(e)
            print(f"{name}: not measured: {e}", file=sys.stderr)
            del model
            continue
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found = log_probs(model, ids)
        kld = float((reference.exp() * (reference - found)).sum(-1).mean())
        for batch in batches:
            step = Step(model, batch, arguments.context)
            step.run()
            graph = device.type == "cuda"
            if graph:
                try:
                    step.capture()
                except Exception as e:
                    # A peer whose kernels cannot be captured is measured without a graph, and its row says so.
                    print(f"{name}: no CUDA graph: {e}", file=sys.stderr)
                    graph = False
            peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
            bits = bits_of_linears(model, n_weights, other)
            rows[name, batch] = Row(name, batch, 0, 0, weight_bytes(model), peak, bits, kld, graph)
            steps[name, batch] = step
        del model
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        step.seconds(2)
    for _ in range(arguments.rounds):
        for key, step in steps.items():
            times[key].append(step.seconds(arguments.steps))
    for key, row in rows.items():
        seconds = statistics.median(times[key])
        row.step_ms, row.tokens_per_s = 1e3 * seconds, key[1] / seconds
    return list(rows.values()), failed


def table(rows: list[Row]) -> str:
    """The rows for people."""
    lines = [
        "| contender | batch | tokens/s | to bf16 | step, ms | weights, GB | bits/weight | KLD, nats | graph |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = {row.batch: row.tokens_per_s for row in rows if row.contender == "bf16"}
    for r in rows:
        ratio = f"{r.tokens_per_s / base[r.batch]:.2f}×" if r.batch in base else ""
        kld = "" if r.kld is None else f"{r.kld:.2g}"
        lines.append(
            f"| {r.contender} | {r.batch} | {r.tokens_per_s:.1f} | {ratio} | {r.step_ms:.3f} | {r.weight_bytes / 1e9:.3f} "
            f"| {r.bits_per_weight:.2f} | {kld} | {'yes' if r.graph else 'no'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m codecllm.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="directory of a BF16 checkpoint [default: random weights of --shape]")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama-1.1b", help="without a model: its shape")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contenders", help="bf16, torchao-int8, torchao-int4, bnb-int8, bnb-nf4, codecllm-FORMAT[:BITS]; "
                        "separated by commas [default: all that can run]")  # fmt: skip
    parser.add_argument("--batch", default="1,4,16", help="sequences in a step")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache before the step")
    parser.add_argument("--text", help="with a model: the text that the divergence is measured on [default: random tokens]")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of it")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=20, help="steps in a turn")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    try:
        rows, failed = run(arguments)
    except (ValueError, OSError, codecllm.DeviceError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if arguments.json:
        where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "codecllm": codecllm.__version__}
        what = arguments.model or arguments.shape
        results = {"rows": [asdict(row) for row in rows], "failed": failed}
        print(json.dumps({"device": where, "model": what, **versions, **results}, indent=2))
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
