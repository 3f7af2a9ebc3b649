"""Triton kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
import torch
from vllm_models.gpu import launch
from vllm_traits import SamplingParams

if TYPE_CHECKING:
    from vllm_models.gpu.sampling_state import SamplingState

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


@pytest.fixture
def sampling_state(
    device: torch.device,
) -> Callable[[Sequence[SamplingParams], Sequence[int]], SamplingState]:
    """What makes the sampler's state of parameters and 64-bit seeds, a row for each."""
    from vllm_models.gpu.sampling_state import SamplingState

    def state_of(params: Sequence[SamplingParams], seeds: Sequence[int]) -> SamplingState:
        halves = [((seed & 0xFFFFFFFF), (seed >> 32) & 0xFFFFFFFF) for seed in seeds]
        return SamplingState(
            torch.tensor([p.temperature for p in params], device=device),
            torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
            torch.tensor([p.top_p for p in params], device=device),
            torch.tensor([p.min_p for p in params], device=device),
            torch.tensor(halves).to(torch.int32).to(device),
        )

    return state_of
