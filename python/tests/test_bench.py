"""`python -m codecllm.bench`."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from codecllm import bench  # noqa: E402

TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def test_a_peer_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: object) -> None:
        raise ImportError("needs another package")

    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench, "_torchao", refuse)
    arguments = ["--shape", "tiny", "--device", "cpu", "--contenders", "bf16,torchao-int4,codecllm-int8", "--batch", "1,2"]
    arguments += ["--context", "8", "--tokens", "16", "--rounds", "1", "--steps", "1", "--json"]
    assert bench.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["contender"], row["batch"]) for row in found["rows"]] == [
        ("bf16", 1), ("bf16", 2), ("codecllm-int8", 1), ("codecllm-int8", 2),
    ]  # fmt: skip
    assert found["failed"] == {"torchao-int4": "needs another package"}
    assert all(row["tokens_per_s"] > 0 for row in found["rows"])
