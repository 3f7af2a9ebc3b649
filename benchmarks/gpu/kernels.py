"""The stages of `kernels`: ceilings, every kernel against them, ceilings again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.cpu.rows import Figure
from benchmarks.gpu import attention, products
from benchmarks.gpu.case import Case, figures
from benchmarks.gpu.ceilings import FULL, SHORT, TINY, Meter
from benchmarks.gpu.stages import Clock, Stage

_SECONDS = {
    "attention at odd lengths": 60,
    "decode attention": 120,
    "prompt attention": 40,
    "products": 120,
    "norms and gates": 20,
    "sampling": 30,
    "experts": 40,
}


def stages(device: torch.device, is_tiny: bool) -> Iterator[Stage]:
    """In the order in which they run."""
    meter = Meter(device, TINY if is_tiny else FULL)
    yield Stage("ceilings", 60, lambda _: meter.figures())
    cases = attention.cases(device, is_tiny) | products.cases(device, is_tiny)
    for name, listed in cases.items():
        yield Stage(name, _SECONDS[name], partial(_measure, listed, device, meter))
    yield Stage("ceilings at the end", 20, lambda _: meter.figures(TINY if is_tiny else SHORT))


def _measure(
    cases: list[Case], device: torch.device, meter: Meter, clock: Clock
) -> Iterator[Figure]:
    for case in cases:
        clock.check()
        yield from figures([case], device, meter.ceilings)
