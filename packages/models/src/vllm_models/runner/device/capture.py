"""Repeating the launches of a function without the host walking through it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Capture(Protocol):
    """Turns a function of static tensors into one that repeats it."""

    def __call__(self, run: Callable[[], T]) -> Callable[[], T]:
        """A function whose results replace those of its last call."""
        ...


def call_again(run: Callable[[], T]) -> Callable[[], T]:
    """The function itself, for devices that cannot capture."""
    return run


class GraphCapture:
    """CUDA graphs that share one pool of memory: capture the largest first.

    Args:
        device: Where the function launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], T]) -> Callable[[], T]:
        """Run once, so that kernels are compiled and libraries set up, then capture."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()

        def replay() -> T:
            graph.replay()
            return result

        return replay
