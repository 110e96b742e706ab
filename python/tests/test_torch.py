"""Compressed layers on the CPU."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path

import codecllm
import pytest

torch = pytest.importorskip("torch")
from codecllm.torch import CompressedEmbedding, CompressedLinear, compress_model_, compressed_modules  # noqa: E402
from torch import nn  # noqa: E402

FORMATS = [("bf16", None), ("fp8", None), ("int8", None), ("rate", 5.0)]


def linear(n_cols: int = 300, n_rows: int = 200, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n_cols, n_rows, bias=bias, dtype=dtype)


@pytest.mark.parametrize(("format", "bits"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products_are_those_of_the_decoded_weight(format: str, bits: float | None, dtype: torch.dtype) -> None:
    plain = linear()
    layer = CompressedLinear.from_linear(plain, format, bits=bits)  # type: ignore[arg-type]
    assert layer.format == format and layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
    weight = layer.decode()
    if format == "bf16":
        assert torch.equal(weight.bfloat16(), plain.weight)
    for shape in [(300,), (1, 300), (2, 7, 300), (40, 300), (0, 300)]:
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        wanted = nn.functional.linear(x.double(), weight.double(), plain.bias.double())
        assert y.dtype == dtype and y.shape == wanted.shape
        # A rounding of the result, and int8's activations in fixed point: 1/65,024 of the largest.
        largest = x.abs().max().double() if x.numel() else 0.0
        room = wanted.abs() * torch.finfo(dtype).eps + largest * weight.abs().sum(1).double() / 65024 + 1e-6
        assert ((y.double() - wanted).abs() <= room).all()


def test_linear_layers_convert_back() -> None:
    plain = linear()
    back = CompressedLinear.from_linear(plain, "bf16").to_linear(torch.bfloat16)
    assert type(back) is nn.Linear and torch.equal(back.weight, plain.weight) and torch.equal(back.bias, plain.bias)


def test_embedding() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(100, 48, dtype=torch.bfloat16), "l": nn.Linear(48, 100, bias=False)})
    model.l.weight = model.e.weight
    plain = copy.deepcopy(model)
    compress_model_(model, "bf16", embeddings=True)
    assert isinstance(model.e, CompressedEmbedding) and model.l.weight is model.e.weight
    ids = torch.tensor([[0, 99, 3], [3, 31, 32]])
    assert torch.equal(model.e(ids), plain.e(ids))
    with pytest.raises(IndexError, match="no row 100 in a matrix of 100 rows"):
        model.e(torch.tensor([100]))
    with pytest.raises(IndexError):
        model.e(torch.tensor([-1]))
    assert model.to(torch.float32).e(ids).dtype == torch.float32


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).eval()


def test_models_are_copied_pickled_saved_and_loaded() -> None:
    model = compress_model_(network(), "bf16")
    x = torch.randn(3, 64)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    # Whatever room a layer was made with, it takes what is loaded.
    other = nn.Sequential(CompressedLinear(64, 128, 0, bias=True), nn.GELU(), CompressedLinear(128, 64, 0))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), y)
    wrong = nn.Sequential(CompressedLinear(64, 100, 0, bias=False))
    with pytest.raises(codecllm.FormatError, match=r"the weight is \(128, 64\), this layer \(100, 64\)"):
        wrong.load_state_dict({"0.weight": model[0].weight})


def test_compile_without_a_graph_break() -> None:
    model = compress_model_(network(), "int8")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (1, 2, 5, 40):
        x = torch.randn(n, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_operators_are_registered_well(format: str) -> None:
    layer = CompressedLinear.from_linear(linear(64, 96), format)  # type: ignore[arg-type]
    key, weight = layer.layout.key, layer.weight
    check = torch.library.opcheck
    x = torch.randn(2, 3, 64, requires_grad=True)
    check(torch.ops.codecllm.linear.default, (x, weight, None, torch.randn(96), key, 96))
    check(torch.ops.codecllm.embedding.default, (torch.tensor([[1, 2]]), weight, None, key, 64))
    check(torch.ops.codecllm.decode.default, (weight, None, key, 96, 64))


def test_gradients_pass_through() -> None:
    layer = CompressedLinear.from_linear(linear(64, 96, dtype=torch.float32), "bf16")
    x = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 96)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.decode())
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_writing_into_a_weight_is_noticed() -> None:
    layer = CompressedLinear.from_linear(linear(64, 96), "int8")
    other = CompressedLinear.from_linear(linear(64, 96), "bf16")
    x = torch.randn(1, 64)
    layer(x)
    with torch.no_grad():
        # The table's bytes: a decoder led by the old ones would go astray.
        layer.weight[130] += 1
    with pytest.raises(codecllm.FormatError, match="not those that it was prepared from"):
        layer(x)
    with pytest.raises(codecllm.FormatError, match="checksum"):
        layer.prepare()
    layer.weight = other.weight
    assert torch.equal(layer(x), other(x))


def test_errors_are_clear() -> None:
    layer = CompressedLinear.from_linear(linear(64, 96), "int8")
    with pytest.raises(ValueError, match="a matrix of 96 × 64"):
        layer(torch.randn(2, 63))
    with pytest.raises(codecllm.FormatError, match="does not begin with `CODECLLM`"):
        CompressedLinear.from_encoded(torch.zeros(256, dtype=torch.uint8))
    with pytest.raises(ValueError, match="needs `bits`"):
        compress_model_(network(), "rate")
    with pytest.raises(ValueError, match="no nn.Linear"):
        compress_model_(network(), "int8", skip=["0", "2"])
    broken = network()
    with torch.no_grad():
        broken[2].weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layer `2`.*NaN|layer `2`.*finite"):
        compress_model_(broken, "int8")
    if not torch.cuda.is_available():
        with pytest.raises(codecllm.DeviceError, match="CUDA: "):
            codecllm._core.cuda_open(0)


class Attention(nn.Module):
    """Calls three layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 96), nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def test_layers_of_one_input_are_computed_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(160, 64), Attention()).eval()
    compress_model_(model, "int8")
    groups = {id(layer._group) for layer in compressed_modules(model).values() if layer._group is not None}
    assert len(groups) == 2
    alone = copy.deepcopy(model)
    for layer in compressed_modules(alone).values():
        layer._group = None
    calls = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += func is torch.ops.codecllm.linears.default
            return func(*args, **(kwargs or {}))

    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for n in (1, 3, 20):
            x = torch.randn(n, 64)
            wanted = alone(x)
            with Count():
                assert torch.equal(model(x), wanted)
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)
            # Whatever order, whatever is called alone.
            attention, plain = model[0], alone[0]
            assert torch.equal(attention.v_proj(x), plain.v_proj(x))
            y = x + 1
            assert torch.equal(attention.v_proj(y), plain.v_proj(y))
            assert torch.equal(attention.v_proj(y), plain.v_proj(y))
            assert torch.equal(attention.q_proj(y), plain.q_proj(y))
    assert calls == 3 * 2
    group = model[2].q_proj._group
    assert group is not None and group.held is None
    # Gradients go through each layer by itself.
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model[0].q_proj.bias.grad is not None
    copied = copy.deepcopy(model)
    assert copied[0].q_proj._group.members[1] is copied[0].k_proj


def test_compress_model_skips_and_shares() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "h": nn.Linear(64, 50), "e": nn.Embedding(50, 64)})
    model.add_module("attention", nn.MultiheadAttention(64, 4))
    model["b"].weight = model["a"].weight
    model["h"].weight = model["e"].weight
    seen: list[str] = []
    compress_model_(model, "rate", bits=6, progress=lambda done, total, name: seen.append(name))
    assert set(compressed_modules(model)) == {"a", "b"} and model["a"].weight is model["b"].weight
    assert seen == ["a", ""]
    # What reads its children's weights by itself keeps them.
    x = torch.randn(3, 1, 64)
    assert model["attention"](x, x, x)[0].shape == (3, 1, 64)


def test_rate_meets_the_size_over_all_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(3)))
    for i, layer in enumerate(model):
        layer.weight.data *= 4.0**i
    compress_model_(model, "rate", bits=4.5)
    layers = compressed_modules(model).values()
    bits = sum(layer.bits_per_weight for layer in layers) / len(layers)
    assert bits == pytest.approx(4.5, abs=0.03)


def test_a_trellis_has_less_error_at_the_same_bits() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False)
    nn.init.normal_(linear.weight)
    plain, trellis = (CompressedLinear.from_linear(linear, "rate", bits=4.0, trellis=t) for t in (False, True))
    assert trellis.bits_per_weight == pytest.approx(plain.bits_per_weight, abs=0.05)
    error = [(layer.decode(torch.float32) - linear.weight).square().mean() for layer in (plain, trellis)]
    assert error[1] < 0.88 * error[0]
    x = torch.randn(3, 512)
    torch.testing.assert_close(trellis(x), x @ trellis.decode(torch.float32).T, rtol=1e-4, atol=1e-2)
    model = compress_model_(nn.Sequential(nn.Linear(512, 512)), "rate", bits=4.0, trellis=True)
    (layer,) = compressed_modules(model).values()
    assert layer.bits_per_weight == pytest.approx(4.0, abs=0.05)
    with pytest.raises(ValueError, match="has no trellis"):
        CompressedLinear.from_linear(linear, "int8", trellis=True)


def test_archives_tensors(archive: Path, tales: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensor, source = codecllm.open(archive)[name], codecllm.open(tales)[name]
    weight = tensor.decode(device="cpu")
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, source.decode(device="cpu"))
    assert torch.equal(torch.from_dlpack(tensor), weight.float())
    layer = CompressedLinear.from_encoded(tensor)
    assert (layer.out_features, layer.in_features) == tensor.shape
    x = torch.randn(2, layer.in_features)
    torch.testing.assert_close(layer(x), x @ weight.float().T, rtol=1e-4, atol=1e-5)


def test_threads_and_forks() -> None:
    layer = CompressedLinear.from_linear(linear(), "int8")
    x = torch.randn(1, 300)
    y = layer(x)
    codecllm.set_threads(1)
    assert codecllm.get_threads() == 1 and torch.equal(layer(x), y)
    codecllm.set_threads(0)
    # A child has none of its parent's threads; it starts its own.
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), y) else 1)
    assert os.waitpid(child, 0)[1] == 0
