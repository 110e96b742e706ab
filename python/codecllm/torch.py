"""Compressed layers for PyTorch.

    from codecllm.torch import CompressedLinear, compress_model_

    compress_model_(model, format="rate", bits=4.5)         # every nn.Linear, in place
    layer = CompressedLinear.from_linear(linear, format="int8")

A layer's weight is one uint8 parameter: the bytes of `docs/format.md`, as they lie in an archive. No decoded copy is kept. Products
run on the CPU with the kernels of the Rust engine, and on a GPU with its CUDA kernels, on PyTorch's current stream and in PyTorch's
memory. They are registered operators (`torch.ops.codecllm.*`), so that `torch.compile` takes them without a graph break, and
they can be captured in CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from codecllm import _core
from codecllm._archive import Tensor as ArchiveTensor

if TYPE_CHECKING:
    from codecllm._archive import Coder, Format, Prefer, Scale

__all__ = ["CompressedEmbedding", "CompressedLinear", "compress_model_", "compressed_modules", "decode", "group_"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# ---------------------------------------------------------------- operators


def _check(x: Tensor, weight: Tensor, tables: Tensor | None) -> None:
    if x.device != weight.device:
        raise RuntimeError(f"the input is on {x.device}, the compressed weight on {weight.device}; move one to the other")
    if weight.is_cuda and (tables is None or tables.device != weight.device):
        raise RuntimeError("the layer was moved to a GPU by hand; call its `prepare()` first")


def _address(tensor: Tensor | None, align: int = 16) -> int:
    """Where a tensor begins."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous() or tensor.data_ptr() % align:
        raise RuntimeError(f"a tensor on the GPU is not contiguous, or does not begin at a multiple of {align} bytes")
    return tensor.data_ptr()


def _matrix(weight: Tensor, tables: Tensor | None, key: int) -> tuple[int, int, int]:
    return key, _address(weight, 64), _address(tables)


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _where(tensor: Tensor) -> tuple[int, int]:
    """The GPU's number and PyTorch's current stream there."""
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _product(x: Tensor, matrices: list[tuple[Tensor, Tensor | None, Tensor | None, int, int]]) -> list[Tensor]:
    """Products of 1 to 16 tokens on a GPU, one launch, in the dtype of x; of each matrix weight, tables, bias, key, rows."""
    dtypes = {x.dtype, *(bias.dtype for _, _, bias, _, _ in matrices if bias is not None)}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        raise RuntimeError(f"inputs and biases of products are float32, or all bfloat16; found {', '.join(map(str, dtypes))}")
    n_tokens = x.numel() // x.shape[-1]
    outs = [x.new_empty(*x.shape[:-1], n_rows) for *_, n_rows in matrices]
    x = _aligned(x)
    with torch.cuda.device(x.device):
        device, stream = _where(x)
        workspace = x.new_empty(_core.cuda_workspace_bytes(x.shape[-1], n_tokens), dtype=torch.uint8)
        sources = [_matrix(weight, tables, key) for weight, tables, _, key, _ in matrices]
        places = [(_address(bias, 2), _address(out, 2)) for (_, _, bias, _, _), out in zip(matrices, outs, strict=True)]
        bf16 = x.dtype == torch.bfloat16
        _core.cuda_product(device, stream, sources, places, _address(x), n_tokens, bf16, _address(workspace))
    return outs


@torch.library.custom_op(
    "codecllm::linear",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor weight, Tensor? tables, Tensor? bias, SymInt key, SymInt n_rows) -> Tensor",
)
def _linear(x: Tensor, weight: Tensor, tables: Tensor | None, bias: Tensor | None, key: int, n_rows: int) -> Tensor:
    """`x · Wᵀ + bias`: x `[..., n_cols]`, weight uint8 `[n_bytes]`, bias `[n_rows]`; `[..., n_rows]`. x, bias and what comes out are
    float32, or all BF16. `key` names the weight's layout.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).float().contiguous().numpy()
    bias_array = None if bias is None else bias.detach().float().contiguous().numpy()
    out = _core.product(weight.detach().numpy(), key, n_rows, rows, bias_array)
    return torch.from_numpy(out).view(*x.shape[:-1], n_rows).to(x.dtype)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, tables: Tensor | None, bias: Tensor | None, key: int, n_rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n_rows)


@_linear.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, tables: Tensor | None, bias: Tensor | None, key: int, n_rows: int) -> Tensor:
    _check(x, weight, tables)
    n_cols = x.shape[-1]
    n_tokens = x.numel() // n_cols
    if n_tokens > _core.CUDA_MAX_TOKENS:
        values = torch.ops.codecllm.decode(weight, tables, key, n_rows, n_cols)
        return nn.functional.linear(x, values.to(x.dtype), bias)
    if not n_tokens:
        return x.new_empty(*x.shape[:-1], n_rows)
    return _product(x, [(weight, tables, bias, key, n_rows)])[0]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, tables, _, key, n_rows = inputs
    ctx.save_for_backward(weight, tables)
    ctx.key, ctx.shape = key, (n_rows, x.shape[-1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, tables = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        values = torch.ops.codecllm.decode(weight, tables, ctx.key, *ctx.shape)
        # BF16 throughout where both are.
        dtype = torch.promote_types(grad.dtype, values.dtype)
        grad_x = (grad.to(dtype) @ values.to(dtype)).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op(
    "codecllm::linears",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] tables, Tensor?[] biases, SymInt[] keys, SymInt[] n_rows) -> Tensor[]",
)
def _linears(
    x: Tensor,
    weights: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    keys: Sequence[int],
    n_rows: Sequence[int],
) -> list[Tensor]:
    """Several `codecllm::linear` of one input; on a GPU, up to 16 tokens are one launch. It has no gradient."""
    matrices = list(zip(weights, tables, biases, keys, n_rows, strict=True))
    n_tokens = x.numel() // x.shape[-1]
    if x.is_cuda and 0 < n_tokens <= _core.CUDA_MAX_TOKENS:
        for weight, table, *_ in matrices:
            _check(x, weight, table)
        return _product(x, matrices)
    return [torch.ops.codecllm.linear(x, *matrix) for matrix in matrices]


@_linears.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    keys: Sequence[int],
    n_rows: Sequence[int],
) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in n_rows]


@torch.library.custom_op(
    "codecllm::embedding",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor ids, Tensor weight, Tensor? tables, SymInt key, SymInt n_cols) -> Tensor",
)
def _embedding(ids: Tensor, weight: Tensor, tables: Tensor | None, key: int, n_cols: int) -> Tensor:
    """The rows `ids`: ids integers, weight uint8 `[n_bytes]`; f32 `[..., n_cols]`. Only blocks with those rows are decoded."""
    rows = ids.reshape(-1).to(torch.int64).contiguous().numpy()
    try:
        out = _core.gather(weight.detach().numpy(), key, n_cols, rows)
    except ValueError as e:
        raise IndexError(f"token out of range: {e}") from None
    return torch.from_numpy(out).view(*ids.shape, n_cols)


@_embedding.register_fake
def _(ids: Tensor, weight: Tensor, tables: Tensor | None, key: int, n_cols: int) -> Tensor:
    return ids.new_empty(*ids.shape, n_cols, dtype=torch.float32)


@_embedding.register_kernel("cuda")
def _(ids: Tensor, weight: Tensor, tables: Tensor | None, key: int, n_cols: int) -> Tensor:
    _check(ids, weight, tables)
    rows = ids.reshape(-1).to(torch.int32)
    # Rows that the matrix does not have stay zero: a GPU's kernels raise no errors.
    out = torch.zeros(*ids.shape, n_cols, dtype=torch.float32, device=ids.device)
    if rows.numel():
        rows = _aligned(rows)
        with torch.cuda.device(ids.device):
            device, stream = _where(ids)
            matrix = _matrix(weight, tables, key)
            _core.cuda_gather(device, stream, matrix, _address(rows), rows.numel(), _address(out))
    return out


@torch.library.custom_op(
    "codecllm::decode",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor weight, Tensor? tables, SymInt key, SymInt n_rows, SymInt n_cols) -> Tensor",
)
def _decode(weight: Tensor, tables: Tensor | None, key: int, n_rows: int, n_cols: int) -> Tensor:
    """The weights `[n_rows, n_cols]`: f32 on the CPU; on a GPU rounded to BF16, which `bf16` has anyway."""
    return torch.from_numpy(_core.dequantize(weight.detach().numpy(), key))


@_decode.register_fake
def _(weight: Tensor, tables: Tensor | None, key: int, n_rows: int, n_cols: int) -> Tensor:
    dtype = torch.bfloat16 if weight.is_cuda else torch.float32
    return weight.new_empty(n_rows, n_cols, dtype=dtype)


@_decode.register_kernel("cuda")
def _(weight: Tensor, tables: Tensor | None, key: int, n_rows: int, n_cols: int) -> Tensor:
    _check(weight, weight, tables)
    out = weight.new_empty(n_rows, n_cols, dtype=torch.bfloat16)
    with torch.cuda.device(weight.device):
        device, stream = _where(weight)
        _core.cuda_decode(device, stream, _matrix(weight, tables, key), _address(out))
    return out


# ---------------------------------------------------------------- layers


class _Compressed(nn.Module):
    """A matrix whose bytes are those of an archive."""

    weight: nn.Parameter
    tables: Tensor | None

    def __init__(self, n_rows: int, n_cols: int, n_bytes: int, device: Any = None) -> None:
        super().__init__()
        self._shape = (n_rows, n_cols)
        self._layout: _core.Layout | None = None
        self._key = 0
        data = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(data, requires_grad=False)
        self.register_buffer("tables", None, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_layout" in self.__dict__:
            self._layout = None
        super().__setattr__(name, value)

    @property
    def layout(self) -> _core.Layout:
        """What the weight's metadata say."""
        if self._layout is None:
            self.prepare()
        assert self._layout is not None
        return self._layout

    def prepare(self) -> None:
        """Validate the weight, and bring to its device what the kernels need. It is called wherever the weight is known to change; call
        it after writing into the weight by hand.

        Raises `FormatError` for bytes that are no encoded matrix of this shape.
        """
        if self.weight.is_meta:
            return
        layout = _core.Layout(self.weight.detach().cpu().numpy(), False)
        if layout.shape != self._shape:
            raise _core.FormatError(f"the weight is {layout.shape}, this layer {self._shape}: [outputs, inputs]")
        self._layout, self._key = layout, layout.key
        self._place_tables()

    def _place_tables(self) -> None:
        assert self._layout is not None
        if self.weight.device.type not in ("cpu", "cuda"):
            raise _core.DeviceError(f"compressed layers run on the CPU and on NVIDIA GPUs, not on {self.weight.device}")
        if not self.weight.is_cuda:
            self.tables = None
            return
        # Opening a GPU makes it the thread's own: the guard brings back the one before.
        with torch.cuda.device(self.weight.device):
            _core.cuda_open(self.weight.device.index)
            self.tables = torch.from_numpy(_core.cuda_tables(self._layout)).to(self.weight.device)

    def _ready(self) -> Tensor | None:
        """The tables, once all is in place: a check of attributes alone where it is."""
        if self._layout is None or (self.tables is None) == self.weight.is_cuda:
            self.prepare()
        return self.tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        layout, device = self._layout, self.weight.device
        super()._apply(fn, recurse)
        # Bytes are moved, never changed: `fn` leaves integers' type alone.
        self._layout = layout
        if layout is not None and self.weight.device != device and not self.weight.is_meta:
            self._place_tables()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(prefix + "weight")
        if loaded is not None and loaded.shape != self.weight.shape:
            self.weight = nn.Parameter(torch.empty_like(loaded, device=self.weight.device), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if loaded is not None:
            self.prepare()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_layout"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.weight.numel():
            self.prepare()

    @property
    def format(self) -> str:
        """The number format."""
        return self.layout.format

    @property
    def bits_per_weight(self) -> float:
        """All of its bits over the number of weights."""
        return 8 * self.weight.numel() / (self._shape[0] * self._shape[1])

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weights, `[outputs, inputs]`; of `dtype`, or float32 on the CPU and bfloat16 on a GPU."""
        tables = self._ready()
        values: Tensor = torch.ops.codecllm.decode(self.weight, tables, self._key, *self._shape)
        return values if dtype is None else values.to(dtype)


class CompressedLinear(_Compressed):
    """`nn.Linear` whose weight stays encoded.

    `weight` is a uint8 parameter `[n_bytes]` (no gradient), `bias` is `[out_features]` or none. The input keeps its dtype; sums are
    float32, or for `int8` and `rate` exact integers.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_bytes: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, n_bytes, device)
        self.in_features, self.out_features = in_features, out_features
        self._group: _Group | None = None
        values = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    @classmethod
    def from_encoded(cls, data: Any, bias: Tensor | None = None, device: Any = None) -> CompressedLinear:
        """A layer of an encoded matrix: an `Archive`'s tensor, or its bytes as an array or a tensor."""
        data = torch.as_tensor(data.data() if isinstance(data, ArchiveTensor) else data)
        n_rows, n_cols = _core.Layout(data.cpu().numpy(), True).shape
        layer = cls(n_cols, n_rows, 0, device=device)
        layer.weight = nn.Parameter(data.to(layer.weight.device), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(layer.weight.device), requires_grad=bias.requires_grad)
        layer.prepare()
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: Format = "int8",
        *,
        bits: float | None = None,
        step: float | None = None,
        trellis: bool = False,
        scale: Scale = "channel",
        coder: Coder = "rans",
        prefer: Prefer = "balanced",
    ) -> CompressedLinear:
        """Encode a layer's weight; the result is on the same device. `rate` takes `bits` per weight, or the `step` of its grid in
        units of the weights; with `trellis` it has less error at the same bits."""
        choice: _Choice = (step, None)
        if format == "rate" and step is None:
            if bits is None:
                raise ValueError("format `rate` needs `bits` or `step`")
            choice = _core.choose_steps([("weight", *_bytes_of(linear.weight))], bits, trellis, coder, prefer)[0]
        data = _encode(linear.weight, format, choice, trellis, scale, coder, prefer)
        layer = cls.from_encoded(data, linear.bias, linear.weight.device)
        layer.train(linear.training)
        return layer

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The plain layer of the decoded weights."""
        values = self.decode(dtype)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(values.dtype), requires_grad=False)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """`x · Wᵀ + bias`, in x's dtype."""
        if self._group is not None and self._group.takes(x):
            return self._group.output(self, x)
        tables = self._ready()
        values = _as_computed(x)
        bias = self.bias if self.bias is None else self.bias.to(values.dtype)
        return torch.ops.codecllm.linear(values, self.weight, tables, bias, self._key, self.out_features).to(x.dtype)

    def extra_repr(self) -> str:
        bits = "" if self.weight.is_meta else f", format={self.format}, bits_per_weight={self.bits_per_weight:.2f}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{bits}"


def _as_computed(x: Tensor) -> Tensor:
    """An input in the dtype that a product reads and writes: BF16 as it is, others as float32."""
    return x if x.dtype == torch.bfloat16 else x.float()


class _Group:
    """Layers that a module calls one after another with the same input: the first call computes the products of all."""

    def __init__(self, members: list[CompressedLinear]) -> None:
        self.members = members
        #: An input and its outputs, for as long as some are to be fetched. One object, so that threads that share a model do not
        #: take each other's.
        self.held: tuple[Tensor, list[Tensor | None]] | None = None

    def takes(self, x: Tensor) -> bool:
        """Whether the layers are in one place, and no gradient is asked for."""
        if torch.is_grad_enabled() and (x.requires_grad or any(m.bias is not None for m in self.members)):
            return False
        return all(m.weight.device == x.device for m in self.members)

    def output(self, member: CompressedLinear, x: Tensor) -> Tensor:
        """The product of one member."""
        place = next(i for i, m in enumerate(self.members) if m is member)
        held = self.held
        if held is None or held[0] is not x or held[1][place] is None:
            tables = [m._ready() for m in self.members]
            weights = [m.weight for m in self.members]
            values = _as_computed(x)
            biases = [None if m.bias is None else m.bias.to(values.dtype) for m in self.members]
            keys, n_rows = [m._key for m in self.members], [m.out_features for m in self.members]
            outs = torch.ops.codecllm.linears(values, weights, tables, biases, keys, n_rows)
            held = self.held = (x, [out.to(x.dtype) for out in outs])
        out = held[1][place]
        assert out is not None
        held[1][place] = None
        if all(o is None for o in held[1]):
            self.held = None
        return out


#: Layers that models of Transformers call in a row with one input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def group_(model: nn.Module, siblings: Iterable[tuple[str, ...]] = _SIBLINGS) -> nn.Module:
    """Have layers that share an input computed together, which a GPU does in one launch; the model.

    `siblings`: names of a module's children that it calls one after another, each once, with the same tensor, which nobody writes into
    meanwhile. `compress_model_` and `from_pretrained` call this for queries, keys and values, and for gate and up.
    """
    for module in model.modules():
        for names in siblings:
            members = [getattr(module, name, None) for name in names]
            same = all(type(m) is CompressedLinear for m in members) and len({m.in_features for m in members if m}) == 1
            group = _Group([m for m in members if m is not None]) if same else None
            for member in members:
                if isinstance(member, CompressedLinear):
                    member._group = group
    return model


class CompressedEmbedding(_Compressed):
    """`nn.Embedding` whose weight stays encoded: the rows that are asked for are decoded, with the 32-row blocks that hold them.

    `dtype` is that of what comes out.
    """

    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        n_bytes: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, n_bytes, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # A buffer, so that `model.to(dtype)` changes it.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids`: `[..., embedding_dim]`."""
        tables = self._ready()
        out = torch.ops.codecllm.embedding(ids, self.weight, tables, self._key, self.embedding_dim)
        return out.to(self.like.dtype)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The plain layer of the decoded weights."""
        values = self.decode(dtype or self.like.dtype)
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding.weight = nn.Parameter(values, requires_grad=False)
        return embedding.train(self.training)

    def extra_repr(self) -> str:
        bits = "" if self.weight.is_meta else f", format={self.format}, bits_per_weight={self.bits_per_weight:.2f}"
        return f"{self.num_embeddings}, {self.embedding_dim}{bits}"


def compressed_modules(model: nn.Module) -> dict[str, CompressedLinear | CompressedEmbedding]:
    """The compressed layers of a model, by name."""
    kinds = (CompressedLinear, CompressedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# ---------------------------------------------------------------- encoding


#: The step of a grid, and the coder's parameters; none where the encoder chooses.
_Choice = tuple[float | None, tuple[int, ...] | None]


def _bytes_of(weight: Tensor) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str, list[int]]:
    if weight.dtype not in _NAMES:
        weight = weight.float()
    weight = weight.detach().cpu().contiguous()
    return weight.view(torch.uint8).reshape(-1).numpy(), _NAMES[weight.dtype], list(weight.shape)


def _encode(
    weight: Tensor, format: str, choice: _Choice, trellis: bool, scale: str, coder: str, prefer: str
) -> Tensor:
    step, params = choice if format == "rate" else (None, None)
    options: Any = {"format": format, "trellis": trellis, "scale": scale, "coder": coder, "prefer": prefer}
    options |= {"step": step, "params": params}
    return torch.from_numpy(_core.encode(*_bytes_of(weight), **options))


def _used_as_tensors(module: nn.Module) -> bool:
    """Whether a module reads the weights of its children by itself, so that those have to stay as they are."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def compress_model_(
    model: nn.Module,
    format: Format = "int8",
    *,
    bits: float | None = None,
    trellis: bool = False,
    scale: Scale = "channel",
    coder: Coder = "rans",
    prefer: Prefer | None = None,
    skip: Iterable[str] = (),
    embeddings: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> nn.Module:
    """Put a `CompressedLinear` in the place of every `nn.Linear` of a model, of any architecture; the model.

    `skip`: layers whose names end with one of these stay as they are. A layer that shares its weight with an embedding is
    compressed with it where `embeddings` are, and else left alone; the experts of Transformers' mixtures become compressed layers, too.
    `format="rate"` meets `bits` per weight over the layers that are compressed, with `trellis` at less error. `prefer` is `speed` for layers on a GPU, else
    `balanced`. `progress(done, total, name)` counts bytes.

    A model of Transformers can then be saved with `save_pretrained` and loaded with `from_pretrained`, compressed.
    """
    if format == "rate" and bits is None:
        raise ValueError("format `rate` needs `bits`")
    if format != "rate" and bits is not None:
        raise ValueError("`bits` goes with format `rate`")
    # Models of Transformers name layers whose dtype they look at.
    skip = (*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
    if "transformers" in _loaded_modules():
        from codecllm.transformers import split_experts_

        split_experts_(model, skip)
    kept = {id(child) for module in model.modules() if _used_as_tensors(module) for child in module.modules()}
    owners: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            owners.setdefault(id(weight), []).append((name, module))

    def fits(name: str, module: nn.Module) -> bool:
        kind = type(module) is nn.Linear or (embeddings and type(module) is nn.Embedding)
        return kind and id(module) not in kept and not any(name == s or name.endswith("." + s) for s in skip)

    jobs = [group for group in owners.values() if all(fits(name, module) for name, module in group)]
    if not jobs:
        raise ValueError("the model has no nn.Linear to compress, or all are skipped")
    if all(module.weight.is_meta for group in jobs for _, module in group):
        raise ValueError("the model's weights are on the meta device: load them first")

    def favour(weight: Tensor) -> str:
        return prefer or ("speed" if weight.is_cuda else "balanced")

    choices: list[_Choice] = [(None, None)] * len(jobs)
    if bits is not None:
        sources = [(f"{group[0][0]}.weight", *_bytes_of(group[0][1].weight)) for group in jobs]
        choices = list(_core.choose_steps(sources, bits, trellis, coder, favour(jobs[0][0][1].weight)))
        del sources
    total = sum(group[0][1].weight.nbytes for group in jobs)
    done = 0
    for group, choice in zip(jobs, choices, strict=True):
        name, module = group[0]
        weight = module.weight
        if progress:
            progress(done, total, name)
        try:
            data = _encode(weight, format, choice, trellis, scale, coder, favour(weight))
        except ValueError as e:
            raise type(e)(f"layer `{name}`: {e}") from None
        shared = nn.Parameter(data.to(weight.device), requires_grad=False)
        replaced: dict[int, nn.Module] = {}
        for other_name, other in group:
            if id(other) not in replaced:
                replaced[id(other)] = _replacement(other, shared)
            parent, _, child = other_name.rpartition(".")
            setattr(model.get_submodule(parent), child, replaced[id(other)])
        done += weight.nbytes
    if progress:
        progress(total, total, "")
    group_(model)
    if "transformers" in _loaded_modules():
        from codecllm.transformers import adopt

        adopt(model, format=format, coder=coder, scale=scale)
    return model


def _loaded_modules() -> dict[str, Any]:
    import sys

    return sys.modules


def _replacement(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    """The compressed layer for a plain one."""
    layer: CompressedLinear | CompressedEmbedding
    if isinstance(module, nn.Linear):
        layer = CompressedLinear(module.in_features, module.out_features, 0, device=weight.device)
        layer.bias = module.bias
    else:
        assert isinstance(module, nn.Embedding)
        layer = CompressedEmbedding(
            module.num_embeddings, module.embedding_dim, 0, module.padding_idx, weight.device, module.weight.dtype
        )
    layer.weight = weight
    layer.prepare()
    return layer.train(module.training)


def decode(tensor: ArchiveTensor, *, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    """An archive's tensor on a device; see `codecllm.Tensor.decode`."""
    device = torch.device(device)
    if not tensor.is_encoded:
        values = torch.from_numpy(tensor._plain())
        values = values.view(torch.bfloat16) if tensor.dtype == "BF16" else values
        return values.to(device, dtype)
    dtype = dtype or _DTYPES[tensor.dtype]
    if device.type == "cuda":
        return CompressedLinear.from_encoded(tensor, device=device).decode(dtype)
    if tensor.format == "bf16":
        return torch.from_numpy(tensor.codes()).view(torch.bfloat16).to(device, dtype)
    return torch.from_numpy(tensor.decode()).to(device, dtype)
