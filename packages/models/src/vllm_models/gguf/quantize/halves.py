"""Half floats as the bytes of a block."""

from __future__ import annotations

import torch
from torch import Tensor

_LIMITS = torch.finfo(torch.float16)


def to_half(values: Tensor) -> Tensor:
    """Rounded to half floats, with the largest of these instead of infinity."""
    return values.clamp(_LIMITS.min, _LIMITS.max).half()


def half_bytes(halves: Tensor) -> Tensor:
    """[n] float16 -> [n, 2] uint8."""
    return halves.view(torch.uint8).view(-1, 2)
