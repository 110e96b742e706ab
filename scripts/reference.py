"""Writes the references that engine/tests/reference.rs compares the engine with.

Transformers runs each model on the CPU: the BF16 weights as they are, all arithmetic in float32, attention eager.

    pip install -r scripts/requirements.txt
    python scripts/reference.py            # everything; needs the trained models under $CODECLLM_SHARED (../shared)
    python scripts/reference.py --tiny     # only the small random models

Results, all under engine/tests/data/:

NAME/                        a small random model of each supported family: config.json, model.safetensors (BF16)
NAME.reference.safetensors   what Transformers says of that model, or of the trained model of that name

A reference file has metadata `stride`, and for each prompt `I` (from 0):

I.tokens                     [n]     the prompt
I.top_ids, I.top_logits      [n, 8]  of every position, the best tokens and their logits
I.stride_logits              [n, ceil(vocabulary / stride)]   logits of the tokens 0, stride, 2·stride, …
I.logsumexp                  [n]     of all logits
I.greedy                     [m]     the greedy continuation
I.greedy_margin              [m]     by how much the best logit led the second: a near tie is no error

Token ids are int32, all else is float32.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    logging,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "engine" / "tests" / "data"

PROMPTS = {
    "tales-5m": [
        "<|endoftext|>Once upon a time",
        "The king had three daughters, and the youngest of them was so beautiful that the sun himself, who had seen "
        "so many things, wondered each time he shone upon her face.",
        "“Who goes there?” cried the fox;\n\n  nobody answered — 12 crows flew up.",
    ],
    "general-50m": [
        "<|endoftext|>In the middle of the night",
        "A compiler reads the text of a program and writes another program that does the same work. To do so it first "
        "cuts the text into tokens, then",
        "def mean(values):\n    return sum(values) / len(values)\n",
    ],
}
STRIDE = {"tales-5m": 64, "general-50m": 128}

BASE = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=None,
)


def rope(**settings):
    return {"rope_type": "default", "rope_theta": 10000.0, **settings}


# Each family: its config, how config.json spells it, the prompt's length, and the single change to the config (or the
# kind of tensor set to zero or one) that must be visible in the logits: what the reference is there to catch.
TINY = {
    "llama-gqa": dict(config=LlamaConfig(**BASE), without=[dict(rope_parameters=rope(rope_theta=500.0))]),
    "llama-rope-llama3": dict(
        config=LlamaConfig(
            **BASE,
            rope_parameters=rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        n_tokens=96,
        without=[dict(rope_parameters=rope())],
    ),
    "llama-old-spelling": dict(
        config=LlamaConfig(**{**BASE, "tie_word_embeddings": True}, rope_parameters=rope(rope_theta=700.0)),
        old_spelling=True,
        without=[dict(rope_parameters=rope())],
    ),
    "llama-rope-linear": dict(
        config=LlamaConfig(**BASE, rope_parameters=rope(rope_type="linear", factor=4.0)),
        old_spelling=True,
        without=[dict(rope_parameters=rope())],
    ),
    "llama-bias": dict(
        config=LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
        without=[f"{p}_proj.bias" for p in ("q", "k", "v", "o", "gate", "up", "down")],
    ),
    "mistral-window": dict(
        config=MistralConfig(**BASE, sliding_window=16),
        without=[dict(sliding_window=None), dict(sliding_window=15)],
    ),
    "qwen2": dict(
        config=Qwen2Config(**{k: v for k, v in BASE.items() if k != "head_dim"}, rope_parameters=rope(rope_theta=1000000.0)),
        without=["q_proj.bias", "k_proj.bias", "v_proj.bias", dict(rope_parameters=rope())],
    ),
    "qwen3": dict(
        config=Qwen3Config(**{**BASE, "head_dim": 16, "tie_word_embeddings": True}),
        without=["q_norm.weight", "k_norm.weight"],
    ),
}
# The smallest difference, relative to the logits' rms, that leaving a feature out must make. The tests' tolerance is
# far below it.
VISIBLE = 0.02
N_TOKENS = 48
N_GREEDY_TINY = 16
N_GREEDY = 64


def load(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, **changes
    ).eval()


@torch.inference_mode()
def logits_of(model, tokens):
    """Logits of every position, [n, vocabulary]."""
    return model(torch.tensor([tokens])).logits[0].float()


@torch.inference_mode()
def continue_greedily(model, tokens, n):
    """The greedy continuation and, for each of its tokens, the best logit's lead over the second."""
    ids, margins = [], []
    past, step = None, torch.tensor([tokens])
    for _ in range(n):
        out = model(step, past_key_values=past, use_cache=True)
        best = out.logits[0, -1].float().topk(2)
        past, step = out.past_key_values, best.indices[:1][None]
        ids.append(best.indices[0].item())
        margins.append((best.values[0] - best.values[1]).item())
    return torch.tensor(ids, dtype=torch.int32), torch.tensor(margins)


def write_reference(name, model, prompts, stride, n_greedy):
    """prompts: the token ids of each."""
    result = {}
    for i, tokens in enumerate(prompts):
        logits = logits_of(model, tokens)
        top = logits.topk(8)
        greedy, margin = continue_greedily(model, tokens, n_greedy)
        result |= {
            f"{i}.tokens": torch.tensor(tokens, dtype=torch.int32),
            f"{i}.top_ids": top.indices.to(torch.int32),
            f"{i}.top_logits": top.values,
            f"{i}.stride_logits": logits[:, ::stride].contiguous(),
            f"{i}.logsumexp": logits.logsumexp(-1),
            f"{i}.greedy": greedy,
            f"{i}.greedy_margin": margin,
        }
        print(f"{name}: prompt {i}, {len(tokens)} tokens, rms {logits.square().mean().sqrt():.3f}, smallest margin {margin.min():.5f}")
    save_file(result, DATA / f"{name}.reference.safetensors", metadata={"stride": str(stride)})
    return result


def spell_old(config):
    """config.json as checkpoints from before Transformers 5 have it."""
    rope_parameters = config.pop("rope_parameters")
    kind, theta = rope_parameters.pop("rope_type"), rope_parameters.pop("rope_theta")
    config["rope_theta"] = theta
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope_parameters}
    config["torch_dtype"] = config.pop("dtype")
    config.pop("head_dim", None)
    config["transformers_version"] = "4.35.0"
    return config


def write_tiny(name, spec, seed):
    folder = DATA / name
    shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(spec["config"], dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if parameter_name.endswith("bias") else 0.2) * noise)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "initializer_range"}
    path.write_text(json.dumps(spell_old(config) if spec.get("old_spelling") else config, indent=2) + "\n")

    model = load(folder)
    tokens = torch.randint(1, BASE["vocab_size"], (spec.get("n_tokens", N_TOKENS),), generator=generator).tolist()
    logits = logits_of(model, tokens)
    rms = logits.square().mean().sqrt()
    for change in spec["without"]:
        if isinstance(change, dict):
            other = load(folder, config=type(spec["config"]).from_dict(spec["config"].to_dict() | change))
        else:
            other = load(folder)
            with torch.no_grad():
                touched = [p for n, p in other.named_parameters() if n.endswith(change)]
                assert touched, f"{name}: no parameter ends with {change}"
                for parameter in touched:
                    parameter.fill_(1.0 if "norm" in change else 0.0)
        difference = ((logits_of(other, tokens) - logits).square().mean().sqrt() / rms).item()
        print(f"  {name}: without {change}: {difference:.3f} of the logits' rms")
        assert difference > VISIBLE, f"{name}: leaving out {change} would pass unnoticed"
    write_reference(name, model, [tokens], stride=1, n_greedy=N_GREEDY_TINY)


def write_trained(name, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[name]]
    result = write_reference(name, load(folder), prompts, STRIDE[name], N_GREEDY)
    for i, prompt in enumerate(PROMPTS[name]):
        print(f"    {prompt!r} …\n    {tokenizer.decode(result[f'{i}.greedy'])!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only the small random models")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    DATA.mkdir(parents=True, exist_ok=True)
    for seed, (name, spec) in enumerate(TINY.items(), start=1):
        write_tiny(name, spec, seed)
    if not arguments.tiny:
        shared = Path(os.environ.get("CODECLLM_SHARED", ROOT.parent / "shared"))
        for name in PROMPTS:
            write_trained(name, shared / "models" / name)


if __name__ == "__main__":
    main()
