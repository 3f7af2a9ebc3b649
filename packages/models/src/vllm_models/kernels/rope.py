"""Rotary position embedding: rotate each pair (x[i], x[i + D/2]) of a head by its position's angle.

x [T, H, D]; cos and sin [T, 1, D], where sin carries the sign of the rotation: its first half is
negated, so that y = x * cos + swap_halves(x) * sin.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate all heads of all tokens."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The textbook form, pair by pair."""
    first, second = x.float().chunk(2, dim=-1)
    cosine, sine = cos.float().chunk(2, dim=-1)[0], sin.float().chunk(2, dim=-1)[1]
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(rotated, dim=-1).to(x.dtype)
