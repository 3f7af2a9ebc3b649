"""Copies from the device to the host that nobody waits for before the numbers are wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Fetch:
    """Tensors on their way to the host.

    Args:
        tensors: On one device; their values at this point of its stream are what arrives.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._is_cuda = any(tensor.is_cuda for tensor in tensors)
        self._arrived = torch.cuda.Event() if self._is_cuda else None
        self._host = [self._start(tensor) for tensor in tensors]
        if self._arrived is not None:
            self._arrived.record()

    def _start(self, tensor: Tensor) -> Tensor:
        if not self._is_cuda:
            return tensor.clone()  # static buffers are written again by the next step
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def done(self) -> bool:
        """Whether everything has arrived."""
        return self._arrived is None or self._arrived.query()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in the order given."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class Timer:
    """How long the device was busy between two points of its stream; 0 where it has no clock."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._events[0].record()

    def stop(self) -> None:
        """The second point."""
        if self._events is not None:
            self._events[1].record()

    def seconds(self) -> float:
        """Between the points, once both are over."""
        if self._events is None:
            return 0.0
        start, end = self._events
        return start.elapsed_time(end) / 1000
