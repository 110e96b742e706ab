"""The compiled module; `codecllm` has what is for use."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str
CUDA_MAX_TOKENS: int

_Path = str | os.PathLike[str]
_Progress = Callable[[int, int, str], object] | None
_Matrix = tuple[int, int, int]

class FormatError(ValueError): ...
class UnsupportedError(ValueError): ...
class DeviceError(RuntimeError): ...

def compress(src: _Path, dst: _Path, **options: Any) -> str: ...
def verify(path: _Path, source: _Path | None, cpu: str | None, progress: _Progress) -> str: ...
def inspect(path: _Path, progress: _Progress) -> str: ...

class Archive:
    def __init__(self, path: _Path) -> None: ...
    def names(self) -> list[str]: ...
    def contains(self, name: str) -> bool: ...
    def tensor(self, name: str, full: bool) -> Tensor: ...

class Tensor:
    name: str
    shape: list[int]
    is_encoded: bool
    format: str
    coder: str
    dtype: str
    n_bytes: int
    relative_error: float
    def data(self) -> NDArray[np.uint8]: ...
    def values(self, start: int, end: int) -> NDArray[np.float32]: ...
    def codes(self) -> NDArray[np.uint8] | NDArray[np.uint16]: ...

class Layout:
    key: int
    shape: tuple[int, int]
    format: str
    coder: str
    dtype: str
    n_bytes: int
    relative_error: float
    def __init__(self, data: NDArray[np.uint8], full: bool) -> None: ...

def encode(
    data: NDArray[np.uint8],
    dtype: str,
    shape: list[int],
    *,
    format: str,
    trellis: bool,
    scale: str,
    coder: str,
    prefer: str,
    step: float | None,
    params: tuple[int, ...] | None,
) -> NDArray[np.uint8]: ...
def choose_steps(
    sources: list[tuple[str, NDArray[np.uint8], str, list[int]]], bits: float, trellis: bool, coder: str, prefer: str
) -> list[tuple[float, tuple[int, ...] | None]]: ...
def product(
    weight: NDArray[np.uint8],
    key: int,
    n_rows: int,
    x: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
) -> NDArray[np.float32]: ...
def gather(weight: NDArray[np.uint8], key: int, n_cols: int, rows: NDArray[np.int64]) -> NDArray[np.float32]: ...
def dequantize(weight: NDArray[np.uint8], key: int) -> NDArray[np.float32]: ...
def set_threads(n: int) -> None:
    """Set the threads of products on the CPU; 0 stands for every core."""

def get_threads() -> int:
    """The threads of products on the CPU."""

def cuda_open(device: int) -> None: ...
def cuda_tables(layout: Layout) -> NDArray[np.int64]: ...
def cuda_workspace_bytes(n_cols: int, n_tokens: int) -> int: ...
def cuda_product(
    device: int,
    stream: int,
    matrices: list[_Matrix],
    outs: list[tuple[int, int]],
    x: int,
    n_tokens: int,
    bf16: bool,
    workspace: int,
) -> None: ...
def cuda_decode(device: int, stream: int, matrix: _Matrix, out: int) -> None: ...
def cuda_gather(device: int, stream: int, matrix: _Matrix, rows: int, n: int, out: int) -> None: ...
