"""Heads of a token in a kernel, each after an optional norm, rotated in their own type.

The first R numbers of a head turn in pairs of neighbours or of halves: y = x * cos + other * sin,
sin negated for the first of a pair. TURN is always a `Turn`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from vllm_models.gpu.rms_norm import inverse_rms, scaled


class Turn(NamedTuple):
    """A rotation, as kernels are told of it.

    Attributes:
        dim: Numbers of a head.
        turned: Those that turn.
        interleaved: Pairs are neighbours, not halves.
    """

    dim: int
    turned: int
    interleaved: bool

    @property
    def run(self) -> int:
        """Neighbours whose other halves are neighbours as well."""
        return math.gcd(self.turned // 2, 8)

    @property
    def tile(self) -> int:
        """Numbers of a head in a kernel."""
        return 1 << (self.dim - 1).bit_length()


@triton.jit
def _across(heads, there, inverse, weight, OFFSET: tl.constexpr, TURN: tl.constexpr):
    """The other number of each pair of halves: [N, TILE] float32."""
    columns = tl.arange(0, TURN.tile)
    turns = columns < TURN.turned
    HALF: tl.constexpr = TURN.turned // 2
    RUN: tl.constexpr = TURN.run
    across = tl.where(columns < HALF, columns + HALF, columns - HALF)
    across = tl.max_contiguous(tl.multiple_of(across, RUN), RUN)
    numbers = tl.load(heads[:, None] + across[None, :], mask=there[:, None] & turns, other=0.0)
    other = numbers.to(tl.float32)
    if weight is not None:
        other = scaled(other, inverse, weight, across, turns, OFFSET)
        other = other.to(numbers.dtype).to(tl.float32)
    return other


@triton.jit
def turned_heads(heads, there, cos, sin, weight, eps, OFFSET: tl.constexpr, TURN: tl.constexpr):
    """Heads [N, TILE] of a token from where `heads` points, rotated, in their own type."""
    TILE: tl.constexpr = TURN.tile
    columns = tl.arange(0, TILE)
    turns, is_in = columns < TURN.turned, columns < TURN.dim
    numbers = tl.load(heads[:, None] + columns[None, :], mask=there[:, None] & is_in, other=0.0)
    wide = numbers.to(tl.float32)
    inverse = 1.0
    if weight is not None:
        inverse = inverse_rms(wide, eps, TURN.dim)
        wide = scaled(wide, inverse, weight, columns, is_in, OFFSET)
        wide = wide.to(numbers.dtype).to(tl.float32)
    if TURN.interleaved:
        first, second = tl.split(tl.reshape(wide, (wide.shape[0], TILE // 2, 2)))
        other = tl.reshape(tl.join(second, first), wide.shape)
    else:
        other = _across(heads, there, inverse, weight, OFFSET, TURN)
    cosine = tl.load(cos + columns, mask=turns, other=1.0).to(tl.float32)
    sine = tl.load(sin + columns, mask=turns, other=0.0).to(tl.float32)
    return (wide * cosine + other * sine).to(numbers.dtype)


@triton.jit
def rope_heads(
    out,
    x,
    token,
    first,
    stride,
    cos,
    sin,
    weight,
    eps,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    OFFSET: tl.constexpr,
    TURN: tl.constexpr,
):
    """Rotate the heads from `first` on of a token of x, and put them into out [T, H, D]."""
    heads = first + tl.arange(0, HEADS)
    there = heads < NUM_HEADS
    source = x + token * stride + heads * TURN.dim
    turned = turned_heads(source, there, cos, sin, weight, eps, OFFSET, TURN)
    columns = tl.arange(0, TURN.tile)
    place = (token * NUM_HEADS + heads)[:, None] * TURN.dim + columns[None, :]
    tl.store(out + place, turned, mask=there[:, None] & (columns < TURN.dim)[None, :])
