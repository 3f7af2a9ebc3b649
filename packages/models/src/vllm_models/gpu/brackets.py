"""Where the threshold of a row is: between the bounds of a bracket, which pivots narrow down.

The first is everything up to the best logit, which is found tile by tile (`stats_kernel`). A
bracket is low, high, what is above high, least, best and target: the threshold t is the smallest
logit with less than the target above it, and low < t <= high. Limits of a row are its temperature,
top-k, top-p, and whether logits are counted, for top-k, or their mass is summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_models.gpu.sampling_state import is_cut, weights

PIVOTS = tl.constexpr(16)
STATS = tl.constexpr(3)  # numbers of a tile of logits
FIELDS = tl.constexpr(8)  # numbers of a bracket in memory; two are free
BEST = tl.constexpr(4)  # which of them is the best logit
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of all finite logits
_REACH = tl.constexpr(32.0)  # of the first pivots below the best, in units of temperature


@triton.jit
def limits_of(row, temperatures, top_ks, top_ps, vocab_size):
    """The limits of a row."""
    top_k = tl.load(top_ks + row)
    is_counted = (top_k > 0) & (top_k < vocab_size)
    return tl.load(temperatures + row), top_k, tl.load(top_ps + row), is_counted


@triton.jit
def stats_kernel(
    tile_stats,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab_size,
    stride,
    TILE: tl.constexpr,
):
    """Largest and smallest finite logit of each tile, and its mass relative to the largest."""
    place, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + place).to(tl.int64)
    if is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
        token_ids = tile * TILE + tl.arange(0, TILE)
        source = logits + place.to(tl.int64) * stride + token_ids
        x = tl.load(source, mask=token_ids < vocab_size, other=-float("inf")).to(tl.float32)
        is_finite = tl.abs(x) < float("inf")
        best = tl.max(tl.where(is_finite, x, LOWEST), axis=0)
        least = tl.min(tl.where(is_finite, x, -LOWEST), axis=0)
        mass = weights(tl.where(is_finite, x, best), best, tl.load(temperatures + row))
        total = tl.sum(tl.where(is_finite, mass, 0.0), axis=0)
        out = tile_stats + (place * tl.num_programs(1) + tile) * STATS
        tl.store(out, best)
        tl.store(out + 1, least)
        tl.store(out + 2, total)


@triton.jit
def first_bracket(tile_stats, place, num_tiles, limits, TILES: tl.constexpr):
    """Everything up to the best logit."""
    temperature, top_k, top_p, is_counted = limits
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    source = tile_stats + (place * num_tiles + tiles) * STATS
    bests = tl.load(source, mask=there, other=LOWEST)
    least = tl.min(tl.load(source + 1, mask=there, other=-LOWEST), axis=0)
    totals = tl.load(source + 2, mask=there, other=0.0)
    best = tl.max(bests, axis=0)
    bests = tl.where(totals > 0, bests, best)
    total = tl.sum(totals * weights(bests, best, temperature), axis=0)
    target = tl.where(is_counted, top_k.to(tl.float32), top_p * total)
    return -float("inf"), best, 0.0, least, best, target


@triton.jit
def pivots_of(bracket, temperature, IS_FIRST: tl.constexpr):
    """Values from the lower end of a bracket upwards, the upper end itself not among them.

    The kernel that measures and the one that reads the measures must get the same bits, however
    their compilations join products and sums: each step here has one rounding.
    """
    low, high, _above, least, best, _target = bracket
    bottom = tl.maximum(tl.maximum(low, least), tl.maximum(high, 0.0) + LOWEST)
    if IS_FIRST:
        bottom = tl.maximum(bottom, best - _REACH * temperature)
    bottom = tl.minimum(bottom, high)
    share = tl.arange(0, PIVOTS).to(tl.float32) / PIVOTS
    return tl.minimum(tl.fma(share, high - bottom, bottom), high)


@triton.jit
def next_bracket(
    brackets, measured, place, num_tiles, temperature, WAS_FIRST: tl.constexpr, TILES: tl.constexpr
):
    """The narrower bracket that the measures at the pivots of a bracket leave."""
    bracket = load_bracket(brackets, place)
    pivots = pivots_of(bracket, temperature, WAS_FIRST)
    low, high, above, least, best, target = bracket
    tiles = tl.arange(0, TILES)[None, :]
    source = measured + (place * num_tiles + tiles) * PIVOTS + tl.arange(0, PIVOTS)[:, None]
    sums = tl.sum(tl.load(source, mask=tiles < num_tiles, other=0.0), axis=1)
    is_enough = sums < target
    next_high = tl.min(tl.where(is_enough, pivots, high), axis=0)
    next_above = tl.max(tl.where(is_enough, sums, above), axis=0)
    next_low = tl.max(tl.where(is_enough, low, pivots), axis=0)
    return next_low, next_high, next_above, least, best, target


@triton.jit
def load_bracket(brackets, place):
    """That of a place in a step."""
    source = brackets + place * FIELDS
    low, high, above = tl.load(source), tl.load(source + 1), tl.load(source + 2)
    return low, high, above, tl.load(source + 3), tl.load(source + BEST), tl.load(source + 5)


@triton.jit
def store_bracket(brackets, place, bracket):
    """Likewise."""
    low, high, above, least, best, target = bracket
    out = brackets + place * FIELDS
    tl.store(out, low)
    tl.store(out + 1, high)
    tl.store(out + 2, above)
    tl.store(out + 3, least)
    tl.store(out + BEST, best)
    tl.store(out + 5, target)
