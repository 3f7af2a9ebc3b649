"""One call of a kernel: what it moves and computes, what it is compared with, how it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cpu.rows import Figure
from benchmarks.gpu.roofline import Ceilings
from benchmarks.gpu.timing import copies_for, measured


class Work(NamedTuple):
    """The least that a call has to do.

    Attributes:
        num_bytes: Read and written.
        operations: Of products.
        is_fp8: Products are in FP8.
    """

    num_bytes: float
    operations: float = 0.0
    is_fp8: bool = False

    def seconds(self, ceilings: Ceilings) -> float:
        """The longer of both."""
        rate = ceilings.fp8 if self.is_fp8 else ceilings.products
        return max(self.num_bytes / ceilings.copy, self.operations / rate)


class Call(NamedTuple):
    """A kernel on data of its own.

    Attributes:
        run: The launch.
        reference: What it should give; None if that takes more memory or time than is sensible.
    """

    run: Callable[[], Tensor]
    reference: Callable[[], Tensor] | None = None


class Case(NamedTuple):
    """A row of the tables.

    Attributes:
        kernel: Its name.
        shape: In words.
        work: Of one call.
        make: Data and call; more than one is made where a cache would hold the data.
        tolerance: Largest error as a share of the largest number.
    """

    kernel: str
    shape: str
    work: Work
    make: Callable[[], Call]
    tolerance: float = 0.02


def figures(cases: Sequence[Case], device: torch.device, ceilings: Ceilings) -> Iterator[Figure]:
    """One row per case; a kernel that is wrong or fails has no time."""
    for case in cases:
        try:
            yield _figure(case, device, ceilings)
        except Exception as fault:  # noqa: BLE001 - the cases that follow still have their turn
            said = f"{type(fault).__name__}: {fault}"[:300]
            yield {"kernel": case.kernel, "shape": case.shape, "fault": " ".join(said.split())}


def _figure(case: Case, device: torch.device, ceilings: Ceilings) -> Figure:
    calls = [case.make() for _ in range(copies_for(int(case.work.num_bytes), device))]
    error = _error(calls[0])
    if error is not None and not error <= case.tolerance:
        raise ValueError(f"wrong: an error of {error:.3g} of the largest number")
    time = measured([call.run for call in calls], device)
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "us": time.seconds * 1e6,
        "spread": time.spread,
        "TB/s": case.work.num_bytes / time.seconds / 1e12,
        "TFLOP/s": case.work.operations / time.seconds / 1e12,
        "of limit": case.work.seconds(ceilings) / time.seconds,
        "error": "" if error is None else error,
    }


def _error(call: Call) -> float | None:
    if call.reference is None:
        return None
    found, wanted = call.run().float(), call.reference().float()
    if not bool(found.isfinite().all()):
        return float("nan")
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))
