"""Scales that make the squared error of rounding small, for many groups of weights at once.

Groups are columns: x is [G, N], N groups of G weights, so that sums over a group run along memory.
Codes and scale are improved in turns: codes are rounded with the scale at hand, then the scale is
the least-squares one for these codes. No turn makes the error larger.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-20


class Affine(NamedTuple):
    """x is about scale * code - offset; each [N], none below 0."""

    scale: Tensor
    offset: Tensor


def fit_affine(x: Tensor, largest: int, starts: tuple[float, ...], turns: int) -> Affine:
    """Scales and offsets for codes 0 to `largest`.

    Args:
        x: [G, N] float32.
        largest: Code.
        starts: Codes that the range of a group is first spread over, less `largest`: one start per
            number, of which the best is taken.
        turns: From each start.
    """
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    best: Affine | None = None
    least = low
    for start in starts:
        scale = (high - low) / (largest + start)
        found, gain = _improve_affine(x, Affine(scale, -low), largest, turns)
        if best is None:
            best, least = found, gain
            continue
        better = gain > least
        best = Affine(
            *(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        )
        least = torch.maximum(gain, least)
    assert best is not None
    return best


def _improve_affine(x: Tensor, now: Affine, largest: int, turns: int) -> tuple[Affine, Tensor]:
    """Some turns; also how much of the sum of squares the last one explains, [N]."""
    size, total = len(x), x.sum(0)
    gain = total
    for _ in range(turns):
        codes = affine_codes(x, now, largest)
        sums, squares, products = codes.sum(0), (codes * codes).sum(0), codes.mul_(x).sum(0)
        spread = size * squares - sums * sums
        scale = (size * products - sums * total) / spread.clamp(min=_TINY)
        offset = (scale * sums - total) / size
        alone = products / squares.clamp(min=_TINY)
        usable = (offset >= 0) & ((spread > 0) | (squares == 0))
        now = Affine(torch.where(usable, scale, alone).clamp_(min=0), offset.clamp(min=0))
        now = Affine(now.scale, torch.where(usable, now.offset, 0))
        gain = now.scale * products - now.offset * total
    return now, gain


def refit_scale(x: Tensor, fit: Affine, largest: int) -> Tensor:
    """The scales that suit the offsets best, given the codes of this fit: [N]."""
    codes = affine_codes(x, fit, largest)
    sums, squares, products = codes.sum(0), (codes * codes).sum(0), codes.mul_(x).sum(0)
    scale = (products + fit.offset * sums) / squares.clamp(min=_TINY)
    return scale.clamp_(min=0)


def affine_codes(x: Tensor, fit: Affine, largest: int) -> Tensor:
    """Codes 0 to `largest` as float32: [G, N]."""
    inverse = inverse_of(fit.scale)
    return torch.addcmul(fit.offset * inverse, x, inverse).round_().clamp_(0, largest)


def fit_symmetric(x: Tensor, levels: int, starts: tuple[float, ...], turns: int) -> Tensor:
    """Scales [N] of either sign for codes -levels to levels - 1.

    Args:
        x: [G, N] float32.
        levels: Code below zero that is farthest; it stands for a group's largest weight.
        starts: Codes that the largest weight is first given, less `levels`; the best is taken.
        turns: From each start.
    """
    best, most = x[0], x[0]
    farthest = extreme(x)
    for number, start in enumerate(starts):
        found, gain = _improve_symmetric(x, farthest / -(levels + start), levels, turns)
        if number == 0:
            best, most = found, gain
        else:
            best = torch.where(gain > most, found, best)
            most = torch.maximum(gain, most)
    return best


def extreme(x: Tensor) -> Tensor:
    """The weight of the largest magnitude with its sign: [G, N] -> [N]."""
    low, high = x.amin(0), x.amax(0)
    return torch.where(high > -low, high, low)


def _improve_symmetric(x: Tensor, scale: Tensor, levels: int, turns: int) -> tuple[Tensor, Tensor]:
    gain = scale
    for _ in range(turns):
        codes = symmetric_codes(x, scale, levels)
        squares, products = (codes * codes).sum(0), codes.mul_(x).sum(0)
        scale = products / squares.clamp(min=_TINY)
        gain = scale * products
    return scale, gain


def symmetric_codes(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Codes -levels to levels - 1 as float32: [G, N]."""
    return (x * inverse_of(scale)).round_().clamp_(-levels, levels - 1)


def inverse_of(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is too small for a half float, which then holds 0."""
    return torch.where(scale.abs() > _TINY, 1 / scale, 0)
