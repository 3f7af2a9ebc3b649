"""Triton kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from vllm_models.gpu import launch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers are made, packed and computed as on a GPU."""
    if device.type == "cpu":
        monkeypatch.setenv("VLLM_LITE_TRITON", "interpret")
    launch.mode.cache_clear()
    with torch.device(device):
        yield
    monkeypatch.undo()
    launch.mode.cache_clear()
