"""Compressed layers on a GPU: against the CPU, in graphs, compiled, in Transformers. `scripts/gpu.sh` runs these."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import codecllm
import pytest

torch = pytest.importorskip("torch")
from codecllm.torch import CompressedEmbedding, CompressedLinear, compress_model_, compressed_modules  # noqa: E402
from torch import nn  # noqa: E402

pytestmark = pytest.mark.cuda

# Shapes with partial blocks, units and rows; what the encoder chooses for each preference has kernels of its own.
SHAPES = [(200, 300), (33, 64), (1024, 2048), (4096, 96)]
FORMATS = [("bf16", None), ("fp8", None), ("int8", None), ("rate", 5.0), ("rate-trellis", 5.0)]
#: Whose sums are whole numbers.
INTEGERS = ("int8", "rate", "rate-trellis")
# A small matrix cannot be had at any rate, but on any grid.
STEP = 0.002


def options_of(format: str) -> dict[str, Any]:
    """A format, or `rate` with a trellis."""
    return {"format": format.removesuffix("-trellis"), "trellis": format.endswith("-trellis")}


def layer(format: str, bits: float | None, shape: tuple[int, int], bias: bool = True, prefer: str = "speed") -> CompressedLinear:
    torch.manual_seed(0)
    plain = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    return CompressedLinear.from_linear(plain, **options_of(format), step=bits and STEP, prefer=prefer)


@pytest.mark.parametrize("prefer", ["size", "balanced", "speed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("format", "bits"), FORMATS)
def test_products_are_those_of_the_cpu(format: str, bits: float | None, shape: tuple[int, int], prefer: str) -> None:
    cpu = layer(format, bits, shape, prefer=prefer)
    gpu = copy.deepcopy(cpu).cuda()
    assert gpu.weight.is_cuda and gpu.tables is not None and gpu.tables.is_cuda
    for n in (1, 2, 8, 9, 16, 17, 100):
        x = torch.randn(n, shape[1])
        wanted, found = cpu(x), gpu(x.cuda()).cpu()
        weight = cpu.decode()
        if format in INTEGERS and n <= 16:
            # Sums are the same integers; the bias is added in float32 on both.
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
            continue
        # 2^-16 of the sum of magnitudes. More tokens: weights rounded to BF16, as `bf16` has them anyway, and float32 sums.
        exact = format == "bf16" or n <= 16
        room = (x.abs() @ weight.abs().T) * (2**-16 if exact else 2**-8) + 1e-6
        assert ((found - wanted).abs() <= room).all()


@pytest.mark.parametrize(("format", "bits"), FORMATS)
def test_products_of_bf16_are_the_others_rounded(format: str, bits: float | None) -> None:
    # One of columns that no four divide, and one of so many that some go through shared memory.
    for shape in [*SHAPES, (70, 333), (40, 12304)]:
        gpu = layer(format, bits, shape).cuda()
        for n in (1, 3, 9, 16):
            x = torch.randn(n, shape[1], device="cuda", dtype=torch.bfloat16)
            found = gpu(x)
            assert found.dtype == torch.bfloat16 and torch.equal(found, gpu(x.float()).bfloat16())
    with pytest.raises(RuntimeError, match=r"torch\.float16"):
        torch.ops.codecllm.linear(x.half(), gpu.weight, gpu.tables, None, gpu.layout.key, shape[0])


@pytest.mark.parametrize(("format", "bits"), FORMATS)
def test_decoding_and_gathering_are_those_of_the_cpu(format: str, bits: float | None) -> None:
    for shape in SHAPES:
        cpu = layer(format, bits, shape)
        gpu = copy.deepcopy(cpu).cuda()
        assert torch.equal(gpu.decode().cpu(), cpu.decode().bfloat16())
        ids = torch.randint(0, shape[0], (3, 5))
        weight = cpu.weight
        rows = torch.ops.codecllm.embedding(ids.cuda(), gpu.weight, gpu.tables, gpu.layout.key, shape[1]).cpu()
        assert torch.equal(rows, torch.ops.codecllm.embedding(ids, weight, None, cpu.layout.key, shape[1]))


def test_moving_there_and_back() -> None:
    cpu = layer("int8", None, (200, 300))
    x = torch.randn(1, 300)
    wanted = cpu(x)
    moved = copy.deepcopy(cpu).to("cuda").to("cpu")
    assert moved.tables is None and torch.equal(moved(x), wanted)
    by_hand = copy.deepcopy(cpu)
    by_hand.weight = nn.Parameter(cpu.weight.detach().cuda(), requires_grad=False)
    by_hand.bias.data = by_hand.bias.data.cuda()
    torch.testing.assert_close(by_hand(x.cuda()).cpu(), wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="the input is on cpu"):
        copy.deepcopy(cpu).cuda()(x)


def test_on_a_stream_of_the_callers() -> None:
    gpu = layer("int8", None, (1024, 2048)).cuda()
    x = torch.randn(1, 2048, device="cuda")
    wanted = gpu(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The product has to wait for what its stream does before it.
        torch.cuda._sleep(20_000_000)
        found = gpu(x * 1.0)
    stream.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("format", "bits"), FORMATS)
@pytest.mark.parametrize("n", [1, 4, 40])
def test_cuda_graphs(format: str, bits: float | None, n: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        layer(format, bits, (1024, 512)), nn.GELU(), layer(format, bits, (512, 1024), bias=False)
    ).cuda().to(torch.bfloat16)  # fmt: skip
    x = torch.randn(n, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for seed in range(3):
            x.copy_(torch.randn(n, 512, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, model(x))


@pytest.mark.parametrize(("format", "bits"), FORMATS)
@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_layers_of_one_input_in_one_launch(format: str, bits: float | None, n: int) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    for name, n_rows in {"q_proj": 1024, "k_proj": 256, "v_proj": 250}.items():
        module.add_module(name, nn.Linear(512, n_rows, bias=name != "k_proj"))
    module.cuda()
    compress_model_(module, **options_of(format), bits=bits)
    x = torch.randn(n, 512, device="cuda")
    with torch.no_grad():
        together = [module.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj")]
        for layer, found in zip(compressed_modules(module).values(), together, strict=True):
            layer._group = None
            wanted = layer(x)
            # Integers' sums are exact; floats' depend on how the launch cuts the rows.
            exact = format in INTEGERS and n <= 16
            torch.testing.assert_close(found, wanted, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-4)


def test_compile_with_cuda_graphs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).cuda().to(torch.bfloat16).eval()
    compress_model_(model, "int8")
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=1e-2)


def test_operators_are_registered_well() -> None:
    gpu = layer("bf16", None, (96, 64)).cuda()
    key, weight, tables = gpu.layout.key, gpu.weight, gpu.tables
    check = torch.library.opcheck
    x = torch.randn(2, 3, 64, device="cuda", requires_grad=True)
    check(torch.ops.codecllm.linear.default, (x, weight, tables, torch.randn(96, device="cuda"), key, 96))
    check(torch.ops.codecllm.embedding.default, (torch.tensor([[1, 2]], device="cuda"), weight, tables, key, 64))
    check(torch.ops.codecllm.decode.default, (weight, tables, key, 96, 64))


def test_archives_tensors_decode_on_the_gpu(tales: Path, archive: Path) -> None:
    source = codecllm.open(tales)
    for name, tensor in codecllm.open(archive).items():
        decoded = tensor.decode(device="cuda")
        assert decoded.is_cuda and torch.equal(decoded.cpu(), source[name].decode(device="cpu"))


@pytest.fixture
def greedy_ids(tales: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tales)
    text = "<|endoftext|>Once upon a time"
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.cuda()


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_greedy_text_of_the_archive_is_the_checkpoints(
    tales: Path, archive: Path, greedy_ids: torch.Tensor, device_map: str
) -> None:
    import codecllm.transformers  # noqa: F401
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tales, dtype=torch.float32, device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32, device_map=device_map)
    assert all(module.weight.is_cuda for module in compressed_modules(model).values())
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    assert torch.equal(model.generate(greedy_ids, **options), plain.generate(greedy_ids, **options))
    # The measure of BF16 is in test_transformers.py: its logits are often equal.
    half = AutoModelForCausalLM.from_pretrained(archive, device_map=device_map)
    with torch.no_grad():
        torch.testing.assert_close(half(greedy_ids).logits.float(), plain(greedy_ids).logits, rtol=0.05, atol=0.2)


def test_a_model_over_several_gpus(tales: Path, archive: Path, greedy_ids: torch.Tensor) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    import codecllm.transformers  # noqa: F401
    from transformers import AutoModelForCausalLM

    half = {f"model.layers.{i}": i // 3 for i in range(6)}
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, **half, "model.norm": 1, "lm_head": 0}
    one = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32, device_map="cuda:0")
    two = AutoModelForCausalLM.from_pretrained(archive, dtype=torch.float32, device_map=device_map)
    assert {m.weight.device.index for m in compressed_modules(two).values()} == {0, 1}
    options = {"max_new_tokens": 32, "do_sample": False}
    assert torch.equal(two.generate(greedy_ids, **options), one.generate(greedy_ids, **options))


def test_a_step_of_a_model_in_a_cuda_graph(archive: Path) -> None:
    from codecllm.bench import Step
    from transformers import AutoModelForCausalLM

    import codecllm.transformers  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(archive, device_map="cuda")
    step = Step(model, batch=1, context=32)
    eager = step.run().clone()
    step.capture()
    torch.testing.assert_close(step.run(), eager, rtol=0.05, atol=0.1)


def test_embedding_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(100, 48, dtype=torch.bfloat16), "l": nn.Linear(48, 8)})
    plain = copy.deepcopy(model).cuda()
    compress_model_(model, "bf16", embeddings=True).cuda()
    assert isinstance(model["e"], CompressedEmbedding)
    ids = torch.tensor([[0, 99, 3], [3, 31, 32]], device="cuda")
    assert torch.equal(model["e"](ids), plain["e"](ids))


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(codecllm.DeviceError, match="there is no GPU 99"):
        codecllm._core.cuda_open(99)
