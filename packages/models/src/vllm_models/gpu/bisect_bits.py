"""The threshold among some logits of a row, exactly, by bisection on the bits of the float.

    threshold = smallest float t so that less than the target is above t

Mass is summed in integers, so neither the order of the logits nor the number of programs shows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_models.gpu.sampling_state import weights

_FIXED = tl.constexpr(1 << 40)  # of a weight of 1; the mass of any vocabulary fits


@triton.jit
def _ordered(x):
    """The bits of a float as an integer of the same order; its own inverse on those bits."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _float_of(ordered):
    bits = ordered.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _above(source, size, pivot, best, temperature, is_counted, CHUNK: tl.constexpr):
    """Number, or mass in fixed point, of the logits greater than a pivot."""
    total = tl.zeros((CHUNK,), dtype=tl.int64)
    for first in range(0, size, CHUNK):
        offsets = first + tl.arange(0, CHUNK)
        x = tl.load(source + offsets, mask=offsets < size, other=-float("inf")).to(tl.float32)
        is_above = x > pivot
        mass = weights(tl.where(is_above, x, best), best, temperature) * _FIXED
        amount = tl.where(is_counted, tl.full((CHUNK,), 1, tl.int64), mass.to(tl.int64))
        total += tl.where(is_above, amount, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(source, size, low, high, target, best, temperature, is_counted, CHUNK: tl.constexpr):
    """The smallest float above which there is less than the target; low < it <= high, ordered."""
    while high - low > 1:
        middle = low + (high - low) // 2
        pivot = _float_of(middle)
        above = _above(source, size, pivot, best, temperature, is_counted, CHUNK)
        is_enough = above < target
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle)
    return high


@triton.jit
def threshold_of(source, size, bracket, above, limits, CHUNK: tl.constexpr):
    """The threshold of top-k, top-p, or top-p of what top-k leaves.

    Args:
        source: Logits.
        size: How many.
        bracket: Where the threshold is, see `brackets`.
        above: What is above everything in the source.
        limits: Of the row, see there.
        CHUNK: Logits looked at together.
    """
    low, high, _high_above, _least, best, target = bracket
    temperature, _top_k, top_p, is_counted = limits
    scale = tl.where(is_counted, 1.0, _FIXED * 1.0)
    missing = ((target - above) * scale).to(tl.int64)
    found = _bisect(
        source, size, _ordered(low), _ordered(high), missing, best, temperature, is_counted, CHUNK
    )
    if is_counted & (top_p < 1):
        below = found - 1
        mass = _above(source, size, _float_of(below), best, temperature, False, CHUNK)
        missing = (mass.to(tl.float32) * top_p).to(tl.int64)
        found = _bisect(
            source, size, below, _ordered(best), missing, best, temperature, False, CHUNK
        )
    return _float_of(found)
