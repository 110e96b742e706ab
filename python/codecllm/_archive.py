"""Archives: made, opened, proven, inspected."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import NDArray

from codecllm import _core

if TYPE_CHECKING:
    import torch

Path = str | os.PathLike[str]
Format = Literal["bf16", "fp8", "int8", "rate"]
Scale = Literal["channel", "tensor"]
Coder = Literal["rans", "zstd"]
Prefer = Literal["size", "balanced", "speed"]
#: Called with the bytes of tensors that are done, those that there are, and the name of the tensor at work. What it raises ends
#: the work.
Progress = Callable[[int, int, str], object]


def compress(
    src: Path,
    dst: Path,
    *,
    format: Format = "int8",
    bits: float | None = None,
    size: int | None = None,
    step: float | None = None,
    trellis: bool = False,
    scale: Scale = "channel",
    coder: Coder = "rans",
    prefer: Prefer = "balanced",
    layers: str = "all",
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint in the directory `src` into the archive `dst`; what was done.

    `format`: `bf16` is lossless; `fp8`, `int8` have a scale a channel (or, with `scale="tensor"`, a tensor); `rate` meets `bits`
    per weight or a `size` in bytes, both of the whole archive, or takes a `step` in standard deviations, and with `trellis` has less error at the
    same size. `prefer`: `size`, `balanced`,
    or `speed` on GPUs. `layers`: `all`, a number of linear layers, a range like `3..8`, or a regular expression on names.

    `dst` appears only when it is complete. `force` replaces an archive; `resume` takes over the finished files of an interrupted
    run.

    Raises `ValueError` for options that do not fit, `FormatError` and `UnsupportedError` for sources, `OSError`, and
    `KeyboardInterrupt` after Ctrl-C, between two tensors.
    """
    options = {"format": format, "bits": bits, "size": size, "step": step, "trellis": trellis}
    more = {"scale": scale, "coder": coder, "prefer": prefer, "layers": layers, "force": force, "resume": resume, "progress": progress}
    return cast("dict[str, Any]", json.loads(_core.compress(src, dst, **options, **more)))


def verify(
    path: Path, source: Path | None = None, *, cpu: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Prove that an archive holds what it should: `["status"]` is `proven`, `wrong` or `unchecked`.

    Checks hashes, structure, and that every decoder of this machine (or that of `cpu`: `scalar`, `avx2`, `avx512`) yields the codes
    of the reference; with the checkpoint `source`, also that codes and scales are exactly the quantizer's.
    """
    return cast("dict[str, Any]", json.loads(_core.verify(path, source, cpu, progress)))


def inspect(path: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Where an archive's bytes go: `["tensors"]`, `["encoded"]` and `["total"]`, in bits per weight."""
    return cast("dict[str, Any]", json.loads(_core.inspect(path, progress)))


def open(path: Path, *, checks: Literal["full", "metadata"] = "metadata") -> Archive:
    """Open an archive, or a checkpoint; its tensors by name.

    A tensor is mapped and validated when it is asked for. `checks="full"` compares its payload's checksum, too.
    """
    return Archive(path, checks=checks)


class Archive(Mapping[str, "Tensor"]):
    """The tensors of an archive, by name, in the order in which they lie."""

    def __init__(self, path: Path, *, checks: Literal["full", "metadata"] = "metadata") -> None:
        if checks not in ("full", "metadata"):
            raise ValueError(f"unknown checks `{checks}`; expected full or metadata")
        self._core = _core.Archive(path)
        self._full = checks == "full"
        self._names = self._core.names()
        self.path = os.fspath(path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return Tensor(self._core.tensor(name, self._full))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._core.contains(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Archive({self.path!r}, {len(self)} tensors)"


_NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32, "I32": np.int32,
    "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16,
}  # fmt: skip


class Tensor:
    """A tensor of an archive: encoded, or as the checkpoint has it."""

    def __init__(self, core: _core.Tensor) -> None:
        self._core = core

    @property
    def name(self) -> str:
        """Its name."""
        return self._core.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights; of a matrix `[outputs, inputs]`."""
        return tuple(self._core.shape)

    @property
    def is_encoded(self) -> bool:
        """Whether it is encoded."""
        return self._core.is_encoded

    @property
    def format(self) -> str:
        """The number format: `bf16`, `fp8`, `int8`, `rate`; of a plain tensor its element type."""
        return self._core.format

    @property
    def coder(self) -> str:
        """`rans`, `zstd`, or `none`."""
        return self._core.coder

    @property
    def dtype(self) -> str:
        """Element type of the source, as safetensors names it: `BF16`, `F16`, `F32`."""
        return self._core.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes in the archive."""
        return self._core.n_bytes

    @property
    def bits_per_weight(self) -> float:
        """All of its bits over the number of weights."""
        return 8 * self.n_bytes / max(1, int(np.prod(self.shape)))

    @property
    def relative_error(self) -> float:
        """The norm of the error over that of the weights, as the encoder measured it."""
        return self._core.relative_error

    def data(self) -> NDArray[np.uint8]:
        """The bytes as they lie in the archive, copied: what `CompressedLinear` takes."""
        return self._core.data()

    def codes(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """The integer codes (`docs/format.md`, section 3), the shape's: uint16 for `bf16`, else uint8."""
        return self._core.codes()

    def rows(self, start: int, end: int) -> NDArray[np.float32]:
        """The values of rows `start` to `end`; only the blocks that hold them are decoded."""
        return self._core.values(start, end)

    @overload
    def decode(self) -> NDArray[Any]: ...
    @overload
    def decode(self, *, device: torch.device | str | int, dtype: torch.dtype | None = None) -> torch.Tensor: ...

    def decode(self, *, device: Any = None, dtype: torch.dtype | None = None) -> Any:
        """The weights.

        Without `device`, a NumPy array: float32 for BF16 and encoded tensors, else of their own type. With one, a PyTorch tensor
        there, of `dtype` (default: the source's); on a GPU it is decoded there, on PyTorch's current stream.
        """
        if device is not None:
            from codecllm.torch import decode

            return decode(self, device=device, dtype=dtype)
        if dtype is not None:
            raise ValueError("`dtype` is PyTorch's; give a `device`, too")
        if self.is_encoded:
            return self.rows(0, self.shape[0])
        array = self._plain()
        if self.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array

    def _plain(self) -> NDArray[Any]:
        """The elements of a tensor that is not encoded; BF16 as its bits."""
        if self.dtype not in _NUMPY:
            raise _core.UnsupportedError(f"tensor `{self.name}`: NumPy has no elements of type {self.dtype}")
        return self.data().view(_NUMPY[self.dtype]).reshape(self.shape)

    def __dlpack__(self, **options: Any) -> Any:
        """The decoded weights for `from_dlpack` of any library, in the host's memory."""
        return self.decode().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __repr__(self) -> str:
        bits = f"{self.bits_per_weight:.2f} bits/weight"
        return f"Tensor({self.name!r}, {list(self.shape)}, {self.format}, {self.coder}, {bits})"
