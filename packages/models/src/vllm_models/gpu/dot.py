"""Products of tiles, that are right in Triton's interpreter as well.

There, numbers of 16 bits are multiplied as if they were integers, and the order of sums depends on
where a row stands in its tile; in double precision neither matters.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_dot(sums, a, b):
    """sums [M, N] float32 + a [M, K] b [K, N]; a and b of one type of floats."""
    if INTERPRETED:
        wide_a, wide_b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        sums += tl.dot(wide_a, wide_b).to(tl.float32)
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums
