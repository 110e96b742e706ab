"""The codec, without PyTorch."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import codecllm
import numpy as np
import pytest


def write_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A checkpoint of F32 tensors; uint16 stands for BF16."""
    path.mkdir(parents=True)
    header, data = {}, b""
    for name, t in tensors.items():
        dtype = {"f4": "F32", "u2": "BF16", "f2": "F16"}[t.dtype.str[1:]]
        header[name] = {"dtype": dtype, "shape": t.shape, "data_offsets": [len(data), len(data) + t.nbytes]}
        data += t.tobytes()
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {f"layers.{i}.weight": bf16(rng.standard_normal((96, 160)) * 0.1) for i in range(3)}
    tensors["norm.weight"] = rng.standard_normal(160).astype(np.float32)
    return write_checkpoint(tmp_path / "source", tensors)


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, codecllm; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lossless_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    summary = codecllm.compress(checkpoint, tmp_path / "a", format="bf16", progress=lambda *a: calls.append(a))
    assert (summary["n_tensors"], summary["n_encoded"]) == (4, 3)
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1] == 3 * 96 * 160 * 2 + 160 * 4
    archive, source = codecllm.open(tmp_path / "a", checks="full"), codecllm.open(checkpoint)
    assert list(archive) == sorted(archive) or set(archive) == set(source)
    assert len(archive) == 4 and "layers.1.weight" in archive and "nothing" not in archive
    for name, tensor in archive.items():
        np.testing.assert_array_equal(tensor.decode(), source[name].decode())
        assert tensor.shape == source[name].shape
    tensor = archive["layers.0.weight"]
    assert (tensor.format, tensor.coder, tensor.dtype, tensor.is_encoded) == ("bf16", "rans", "BF16", True)
    assert tensor.bits_per_weight == 8 * tensor.n_bytes / (96 * 160) < 16
    assert tensor.codes().dtype == np.uint16
    np.testing.assert_array_equal(tensor.rows(5, 40), tensor.decode()[5:40])
    np.testing.assert_array_equal(np.from_dlpack(tensor), tensor.decode())
    assert not archive["norm.weight"].is_encoded
    report = codecllm.verify(tmp_path / "a", checkpoint)
    assert report["status"] == "proven"
    assert codecllm.inspect(tmp_path / "a")["total"]["n_weights"] == 3 * 96 * 160 + 160


@pytest.mark.parametrize("format", ["int8", "fp8", "rate"])
def test_quantized(checkpoint: Path, tmp_path: Path, format: str) -> None:
    codecllm.compress(checkpoint, tmp_path / "a", format=format, bits=7.5 if format == "rate" else None)
    source = codecllm.open(checkpoint)
    for name, tensor in codecllm.open(tmp_path / "a").items():
        wanted = source[name].decode()
        error = np.linalg.norm(tensor.decode() - wanted) / np.linalg.norm(wanted)
        assert error == pytest.approx(tensor.relative_error, rel=1e-3)
        assert (0 < error < 0.05) == tensor.is_encoded


def test_errors_have_the_codecs_texts(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing: No such file or directory"):
        codecllm.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown format `int7`; expected one of bf16, fp8, int8, rate"):
        codecllm.compress(checkpoint, tmp_path / "a", format="int7")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format `rate` needs one of"):
        codecllm.compress(checkpoint, tmp_path / "a", format="rate")
    with pytest.raises(ValueError, match="go with format `rate`"):
        codecllm.compress(checkpoint, tmp_path / "a", format="int8", bits=4)
    with pytest.raises(ValueError, match="has no trellis"):
        codecllm.compress(checkpoint, tmp_path / "a", format="fp8", trellis=True)
    codecllm.compress(checkpoint, tmp_path / "a")
    with pytest.raises(ValueError, match="it exists already"):
        codecllm.compress(checkpoint, tmp_path / "a")
    with pytest.raises(codecllm.UnsupportedError, match="archive already"):
        codecllm.compress(tmp_path / "a", tmp_path / "b")
    with pytest.raises(KeyError):
        codecllm.open(tmp_path / "a")["nothing"]
    with pytest.raises(ValueError, match="is not encoded"):
        codecllm.open(tmp_path / "a")["norm.weight"].codes()
    with pytest.raises(ValueError, match="rows 90..97"):
        codecllm.open(tmp_path / "a")["layers.0.weight"].rows(90, 97)

    shard = tmp_path / "a" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    at = data.index(b"CODECLLM")
    data[at + 12] = 9
    shard.write_bytes(data)
    with pytest.raises(codecllm.UnsupportedError, match="tensor `layers.*format 9 is unknown"):
        for tensor in codecllm.open(tmp_path / "a").values():
            tensor.decode()
    assert codecllm.verify(tmp_path / "a")["status"] == "wrong"


def test_what_progress_raises_ends_the_work(checkpoint: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def progress(done: int, total: int, name: str) -> None:
        if done:
            raise Enough

    with pytest.raises(Enough):
        codecllm.compress(checkpoint, tmp_path / "a", progress=progress)
    assert not (tmp_path / "a").exists()


def test_keyboard_interrupt(checkpoint: Path, tmp_path: Path) -> None:
    """SIGINT arrives between two tensors; nothing stands in the archive's place."""

    def progress(done: int, total: int, name: str) -> None:
        if 0 < done < total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        codecllm.compress(checkpoint, tmp_path / "a", progress=progress)
    assert not (tmp_path / "a").exists()


def test_other_threads_run_meanwhile(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    big = write_checkpoint(tmp_path / "big", {"w.weight": bf16(rng.standard_normal((4096, 2048)))})
    ticks, done = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    start = time.monotonic()
    codecllm.compress(big, tmp_path / "a", format="bf16")
    elapsed = time.monotonic() - start
    done.set()
    counter.join()
    # One call into Rust: a thread that waited for it would have counted next to nothing.
    assert ticks > 50 * elapsed
