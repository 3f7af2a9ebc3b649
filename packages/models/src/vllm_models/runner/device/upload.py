"""One copy from the host to the device per step, whatever the step has to say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_RING = 4  # steps whose copies may be under way at once; two are in flight
_ROOM = 1 << 16  # numbers of a staging buffer before it has to grow


class Upload:
    """Staging memory for int32 arrays, used in turn.

    A buffer is written again only after the copy out of it is over.

    Args:
        device: Where the arrays go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * _RING
        self._copied: list[torch.cuda.Event | None] = [None] * _RING
        self._next = 0

    def send(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Copies on the device as flat int32 tensors, which share one allocation."""
        sizes = [array.size for array in arrays]
        staged = self._staging(sum(sizes))
        numbers = staged.numpy()
        first = 0
        for array in arrays:
            numbers[first : first + array.size] = array.reshape(-1)
            first += array.size
        return list(self._copy(staged).split(sizes))

    def _staging(self, size: int) -> Tensor:
        if not self._is_cuda:
            return torch.empty(size, dtype=torch.int32)
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        buffer = self._buffers[self._next]
        if buffer is None or len(buffer) < size:
            room = max(_ROOM, 1 << (size - 1).bit_length())
            buffer = torch.empty(room, dtype=torch.int32, pin_memory=True)
            self._buffers[self._next] = buffer
        return buffer[:size]

    def _copy(self, staged: Tensor) -> Tensor:
        if not self._is_cuda:
            return staged.to(self.device)
        sent = staged.to(self.device, non_blocking=True)
        event = self._copied[self._next] or torch.cuda.Event()
        event.record()
        self._copied[self._next] = event
        self._next = (self._next + 1) % _RING
        return sent
