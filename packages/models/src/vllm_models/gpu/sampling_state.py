"""How every row samples, on the device, and what kernels make of it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class SamplingState(NamedTuple):
    """How every row samples; a row of each tensor per row of the state.

    Attributes:
        temperature: [R + 1] float32; 0 is greedy.
        top_k: [R + 1] int32; 0 keeps all.
        top_p: [R + 1] float32 in (0, 1].
        min_p: [R + 1] float32 in [0, 1].
        seeds: [R + 1, 2] int32: low and high half of a 64-bit seed.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor


@triton.jit
def is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
    """Whether a row has a threshold."""
    top_k = tl.load(top_ks + row)
    is_limited = (top_k > 0) & (top_k < vocab_size)
    is_limited = is_limited | (tl.load(top_ps + row) < 1) | (tl.load(min_ps + row) > 0)
    return is_limited & (tl.load(temperatures + row) > 0)


@triton.jit
def steepness(temperature):
    """What turns a difference of logits into one of base-2 logarithms of probabilities."""
    return tl.minimum(1.4426950408889634 / temperature, 1e30)


@triton.jit
def weights(x, best, temperature):
    """Probabilities relative to the best token's."""
    return tl.exp2((x - best) * steepness(temperature))
