"""Random numbers in a kernel: the hash of seed, position and token id that the CPU's sampler has.

    key       = mix(mix(seed) + position * 0x9E3779B97F4A7C15)         64 bits, two halves
    x         = hash(token id, key)                                    31 bits
    u         = x / 2^31 + 2^-32, at most 1 - 2^-24
    noise     = -log(1 - u), exponentially distributed

Every integer is the CPU's to the bit; the logarithms may differ in the last places.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """Spread the bits of an unsigned 64-bit integer over all of it, one to one."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def key_of(low, high, position):
    """The key of one draw from the halves of a seed and a position, all int32."""
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(
        tl.uint32, bitcast=True
    ).to(tl.uint64)
    return mix(mix(seed) + position.to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def exponential(key, token_ids):
    """A draw from the exponential distribution of rate 1 for each token id (int32)."""
    x = token_ids.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = ((x ^ (x >> 15)) ^ (key >> 32).to(tl.uint32)) * 0xD35A2D97
    x = (x ^ (x >> 15)) & 0x7FFFFFFF
    u = x.to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    return _minus_log1p(tl.minimum(u, 0.99999994))


@triton.jit
def _minus_log1p(u):
    """-log(1 - u) for u in (0, 1), within 3e-7 of itself for the small u that win as for others.

    1 - u = 2^e * (1 + f) with f in [-1/4, 1/2), where log(1 + f) = f + f^2 * polynomial(f). Half
    the work of a library's logarithm, which has to expect any number.
    """
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(u < 0.25, -u, f)
    series = f * 0.0541316382586956 - 0.1206730529665947
    series = series * f + 0.14983920753002167
    series = series * f - 0.16822820901870728
    series = series * f + 0.19977077841758728
    series = series * f - 0.24993441998958588
    series = series * f + 0.3333354890346527
    series = series * f - 0.5000005960464478
    return -(exponent.to(tl.float32) * 8.262958294867817e-08 + (series * f * f + f))
