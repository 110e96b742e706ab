"""What the tests share."""

from __future__ import annotations

import os
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
def shared() -> Path:
    """Test models that are not part of the repository."""
    folder = Path(os.environ.get("CODECLLM_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        message = f"{folder} has no test models; set CODECLLM_SHARED to the folder that has"
        assert "CI" not in os.environ, message
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def tales(shared: Path) -> Path:
    """A trained BF16 Llama of 5 million weights."""
    return shared / "models" / "tales-5m"


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
