"""What the tests share."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """PyTorch's threads wait for each other longer than these small models take."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained BF16 Llama of 5 million weights, as Hugging Face's checkpoints are: restored from the archive in the repository."""
    import codecllm
    import torch
    from safetensors.torch import save_file

    source, path = ROOT / "assets" / "tales-5m", tmp_path_factory.mktemp("checkpoint") / "tales"
    path.mkdir()
    tensors = {name: tensor.decode(device="cpu") for name, tensor in codecllm.open(source, checks="full").items()}
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    return path


@pytest.fixture(scope="session")
def archive(tales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, lossless."""
    import codecllm

    path = tmp_path_factory.mktemp("archive") / "tales.bf16"
    codecllm.compress(tales, path, format="bf16")
    return path


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one, unless they are called for."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if not marked:
        return
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if not found and os.environ.get("CODECLLM_REQUIRE_CUDA") != "1":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="PyTorch finds no GPU"))
