"""Memory of the KV pool is there before it is written."""

from __future__ import annotations

import sys

import pytest
import torch
from vllm_models.native.packed import zeros_of
from vllm_models.runner import backing
from vllm_models.runner.backing import Backing, populate

LAYERS, BLOCKS, WIDTH = 3, 40, 1024


class Asked:
    """Stands for the system."""

    def __init__(self, is_able: bool = True) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.is_able = is_able

    def __call__(self, address: int, num_bytes: int) -> bool:
        self.ranges.append((address, num_bytes))
        return self.is_able


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is 2 * LAYERS * WIDTH bytes: eight ahead, two at a time."""
    monkeypatch.setattr(backing, "AHEAD", 8 * 2 * LAYERS * WIDTH)
    monkeypatch.setattr(backing, "STEP", 2 * 2 * LAYERS * WIDTH)


def pool() -> list[torch.Tensor]:
    return [torch.zeros(LAYERS, BLOCKS, WIDTH, dtype=torch.uint8) for _ in range(2)]


def wait(kept: Backing) -> None:
    thread = kept.thread
    if thread is not None:
        thread.join(timeout=60)
    assert kept.thread is None


def test_blocks_are_ready_before_they_are_reached_and_each_is_asked_for_once() -> None:
    tensors, asked = pool(), Asked()
    kept = Backing(tensors, asked)
    for used, ready in ((0, 8), (1, 8), (2, 10), (5, 13), (30, 38), (39, BLOCKS), (BLOCKS, BLOCKS)):
        kept.reach(used)
        wait(kept)
        assert used <= kept.num_ready == ready
    starts = {layer.data_ptr() for tensor in tensors for layer in tensor}
    covered = [byte for first, size in asked.ranges for byte in range(first, first + size, WIDTH)]
    assert len(covered) == len(set(covered)) == 2 * LAYERS * BLOCKS
    assert starts <= set(covered)


def test_a_system_that_cannot_is_asked_no_more() -> None:
    asked = Asked(is_able=False)
    kept = Backing(pool(), asked)
    kept.reach(0)
    wait(kept)
    count = len(asked.ranges)
    kept.reach(30)
    wait(kept)
    assert count == len(asked.ranges) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_pages_become_memory_and_keep_what_they_hold() -> None:
    numbers = zeros_of((64 << 20,), torch.uint8)
    numbers[5] = 7
    before = resident()
    assert populate(numbers.data_ptr(), numbers.nbytes)
    assert resident() - before > 48 << 20
    assert numbers[5] == 7 and int(numbers.sum()) == 7


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
