"""What the machine can do: read memory, copy it, multiply matrices in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from vllm_models.native.library import Library
from vllm_models.native.packed import zeros

from benchmarks.cpu.rows import Figure, seconds

MEMORY = 256 << 20  # bytes; more than any cache
SIDE = 1536


class Ceilings(NamedTuple):
    """Rates of this machine with the threads of this run."""

    read: float  # bytes/s
    copy: float  # bytes/s, read and written counted
    products: float  # floating-point operations/s


class Meter:
    """Measures the ceilings again and again, since neighbours come and go."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._from, self._to = zeros(MEMORY).fill_(1), zeros(MEMORY).fill_(1)
        self._matrix = torch.randn(SIDE, SIDE).bfloat16()

    def read(self, rounds: int = 5) -> float:
        """Bytes/s."""
        place = self._from.data_ptr()
        return MEMORY / seconds(lambda: self._library.read_memory(place, MEMORY), rounds)

    def copy(self, rounds: int = 5) -> float:
        """Bytes/s, read and written counted."""
        places = self._from.data_ptr(), self._to.data_ptr()
        return 2 * MEMORY / seconds(lambda: self._library.copy_memory(*places, MEMORY), rounds)

    def products(self, rounds: int = 5) -> float:
        """Operations/s of torch's bfloat16 matrix product."""
        return 2 * SIDE**3 / seconds(lambda: self._matrix @ self._matrix, rounds)


def figures(library: Library) -> Iterator[Figure]:
    """One row per ceiling."""
    meter = Meter(library)
    threads = torch.get_num_threads()
    for name, rate, unit in (
        ("read", meter.read() / 1e9, "GB/s"),
        ("copy", meter.copy() / 1e9, "GB/s"),
        ("bf16 products", meter.products() / 1e9, "GFLOP/s"),
    ):
        yield {"ceiling": name, "rate": rate, "unit": unit, "threads": threads}
