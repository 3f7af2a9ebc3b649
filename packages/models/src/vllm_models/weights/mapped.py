"""A file mapped into memory, of which tensors are views and whose used-up parts are given back."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor
from vllm_traits import ModelError


class MappedFile:
    """A read-only file as bytes.

    Args:
        path: An existing file that is not empty.

    Raises:
        ModelError: It cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Private and never written: torch warns of memory that it may not write to.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be mapped into memory: {error}.") from error

    def view(self, offset: int, num_bytes: int) -> Tensor:
        """The bytes as uint8 [num_bytes], without a copy."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=offset)

    def release(self, offset: int, num_bytes: int) -> None:
        """Drop the whole pages of these bytes from this process; reading them again maps anew."""
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
