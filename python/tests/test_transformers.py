"""Archives and compressed models in Transformers, on the CPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import codecllm
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import codecllm.transformers as integration  # noqa: E402
from codecllm.torch import CompressedEmbedding, CompressedLinear, compress_model_, compressed_modules  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["<|endoftext|>Once upon a time", "The king had three daughters, and the youngest", "In the forest there"]


def greedy(model: torch.nn.Module, ids: torch.Tensor, n: int = 64) -> list[int]:
    out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def tokenizer(tales: Path) -> transformers.PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tales)


def encode(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def test_every_matrix_of_an_archive_stays_encoded(archive: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(archive)
    layers = compressed_modules(model)
    assert isinstance(layers["model.embed_tokens"], CompressedEmbedding)
    assert isinstance(layers["lm_head"], CompressedLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = codecllm.open(archive)
    assert len(layers) == 1 + sum(tensor.is_encoded for tensor in tensors.values())
    for name, tensor in tensors.items():
        if tensor.is_encoded:
            weight = model.get_parameter(name)
            assert weight.dtype == torch.uint8 and bytes(weight.numpy()) == bytes(tensor.data())
    assert model.dtype == torch.bfloat16 and not model.training


def test_greedy_texts_are_those_of_the_checkpoint(archive: Path, tales: Path, tokenizer: object) -> None:
    """In float32 token for token. In BF16 Transformers' own sums round to BF16, so that the best two logits are often equal there: the
    texts may part only where BF16 cannot tell the two tokens apart."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = AutoModelForCausalLM.from_pretrained(tales, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(archive, dtype=dtype)
        for prompt in PROMPTS:
            ids = encode(tokenizer, prompt)
            wanted, found = greedy(plain, ids), greedy(model, ids)
            if dtype == torch.float32:
                assert found == wanted
                continue
            parting = next((i for i, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), None)
            if parting is not None:
                before = torch.cat([ids, torch.tensor([wanted[:parting]], dtype=ids.dtype)], 1)
                logits = plain(before).logits[0, -1].float()
                a, b = logits[wanted[parting]], logits[found[parting]]
                # Neighbouring BF16 numbers, whichever way the last sum was rounded.
                assert abs(a - b) <= 2 * torch.finfo(torch.bfloat16).eps * a


def test_greedy_texts_are_those_of_the_engine(archive: Path, tokenizer: object) -> None:
    program = ROOT / "target" / "release" / "codecllm"
    if not program.exists():
        subprocess.run(["cargo", "build", "--release", "-p", "codecllm"], cwd=ROOT, check=True)
    model = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32)
    for prompt in PROMPTS:
        command = [program, "run", archive, "-p", prompt, "-n", "64", "--ignore-eos", "--json"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        text = json.loads(run.stdout)["text"]
        found = greedy(model, encode(tokenizer, prompt))
        assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_batches_with_padding(archive: Path, tales: Path, tokenizer: object) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tales, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32)
    tokenizer.pad_token = tokenizer.decode([0])
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))


def test_saved_and_loaded_it_stays_compressed(archive: Path, tmp_path: Path, tokenizer: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(archive)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "codecllm"
    assert config["quantization_config"]["format"] == "bf16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert set(compressed_modules(again)) == set(compressed_modules(model))
    ids = encode(tokenizer, PROMPTS[0])
    assert torch.equal(again(ids).logits, model(ids).logits)
    # What Transformers saved is an archive for the codec, too.
    for tensor in codecllm.open(tmp_path / "again", checks="full").values():
        tensor.decode()


def test_compile(archive: Path, tokenizer: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32)
    ids = encode(tokenizer, PROMPTS[0])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


def test_dequantize(archive: Path, tales: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tales)
    model = AutoModelForCausalLM.from_pretrained(archive)
    model.dequantize()
    assert not compressed_modules(model)
    for name, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_plain_checkpoint_is_compressed_as_it_is_loaded(tales: Path, tmp_path: Path, tokenizer: object) -> None:
    config = integration.CodecConfig(format="int8", modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tales, quantization_config=config)
    names = set(compressed_modules(model))
    assert "model.layers.0.mlp.up_proj" in names and "model.layers.0.mlp.down_proj" not in names
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(compressed_modules(again)) == names
    ids = encode(tokenizer, PROMPTS[0])
    assert torch.equal(again(ids).logits, model(ids).logits)


def small(kind: str) -> transformers.PreTrainedModel:
    """A small random model of an architecture that the Rust engine does not run."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "vision":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=5)
        )
    if kind == "encoder":
        return transformers.BertForMaskedLM(transformers.BertConfig(**size, vocab_size=200))
    if kind == "encoder-decoder":
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 200}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    experts = {"num_key_value_heads": 2, "vocab_size": 200, "num_experts_per_tok": 2}
    if kind == "qwen3-moe":
        more = {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**size, **experts, **more))
    assert kind == "mixtral"
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**size, **experts, num_local_experts=4))


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if kind == "vision":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    ids = torch.randint(1, 200, (2, 7))
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "encoder-decoder" else {"input_ids": ids}


KINDS = ["vision", "encoder", "encoder-decoder", "qwen3-moe", "mixtral"]


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_in_memory(kind: str, embeddings: bool, tmp_path: Path) -> None:
    """BF16 weights, lossless: the same outputs but for the order of sums, also once saved and loaded."""
    model = small(kind).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    inputs = inputs_of(kind)
    with torch.no_grad():
        wanted = model(**inputs).logits
        plain = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
        # T5 looks at the dtype of its `wo`; a shared head goes with its embedding.
        plain = {name for name in plain if "wo" not in name.split(".")}
        compress_model_(model, "bf16", embeddings=embeddings)
        left = plain - set(compressed_modules(model))
        assert not left if embeddings else left <= {"lm_head", "cls.predictions.decoder"}
        if "moe" in kind or kind == "mixtral":
            experts = [m for m in model.modules() if isinstance(m, integration.CompressedExperts)]
            assert len(experts) == 2 and sum(len(compressed_modules(e)) for e in experts) == 2 * 4 * 3
        found = model(**inputs).logits
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert set(compressed_modules(again)) == set(compressed_modules(model))
        torch.testing.assert_close(again(**inputs).logits, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_as_archives(kind: str, tmp_path: Path) -> None:
    """A checkpoint in Hugging Face's form, compressed by the codec, which knows nothing of the architecture."""
    model = small(kind).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    codecllm.compress(tmp_path / "source", tmp_path / "archive", format="bf16")
    again = type(model).from_pretrained(tmp_path / "archive", dtype=torch.float32)
    linear = [name for name, module in model.float().named_modules() if type(module) is torch.nn.Linear]
    kept = {name for name in linear if "wo" in name.split(".")}  # T5 asks for those in float32
    assert set(linear) - kept <= set(compressed_modules(again))
    assert not any(type(m) is torch.nn.Linear for n, m in again.named_modules() if n not in kept)
    inputs = inputs_of(kind)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-3, atol=1e-4)
        again.save_pretrained(tmp_path / "saved")
        third = type(model).from_pretrained(tmp_path / "saved", dtype=torch.float32)
        torch.testing.assert_close(third(**inputs).logits, again(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_base_model_from_an_archive_of_the_whole(archive: Path, tales: Path) -> None:
    base, plain = AutoModel.from_pretrained(archive, dtype=torch.float32), AutoModel.from_pretrained(tales, dtype=torch.float32)
    ids = torch.arange(10)[None]
    assert "layers.0.mlp.up_proj" in compressed_modules(base)
    torch.testing.assert_close(base(ids).last_hidden_state, plain(ids).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_clear_errors(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(codecllm.DeviceError, match="CPU and on NVIDIA GPUs, not on mps"):
        AutoModelForCausalLM.from_pretrained(archive, device_map="mps")
    for file in archive.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] += 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(codecllm.FormatError, match=r"is \(\d+, \d+\) by the model's configuration"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
