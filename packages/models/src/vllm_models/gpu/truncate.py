"""Top-k, top-p and min-p as one threshold per row, found without sorting the vocabulary.

    above(t)  = number (top-k) or probability mass (top-p) of the logits greater than t
    threshold = smallest logit t of the row with above(t) < k, or < p of the mass

so tokens of equal logit stay or go together. Two passes of 16 pivots each narrow down where the
threshold is, a third collects the few logits in between, and one program per row bisects those on
the bits of the float. With top-k and top-p both, the passes look for top-k and everything from
there up is collected. Rows that need no threshold leave each kernel at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 4096
_CHUNK = 512  # of a tile, compared with all pivots at once
_ROOM = 4096  # logits collected per row; with more, the row itself is bisected

_PIVOTS = tl.constexpr(16)
_REACH = tl.constexpr(40.0)  # in units of temperature below the best, for the first pivots
_FIELDS = tl.constexpr(8)  # of a bracket: low, high, above high, least, best, target
_FIXED = tl.constexpr(1 << 40)  # weights as integers: their sum has no order


class SamplingState(NamedTuple):
    """How every row samples; a row of each tensor per row of the state.

    Attributes:
        temperatures: [R + 1] float32; 0 is greedy.
        top_ks: [R + 1] int32; 0 keeps all.
        top_ps: [R + 1] float32 in (0, 1].
        min_ps: [R + 1] float32 in [0, 1].
        seeds: [R + 1, 2] int32: low and high half of a 64-bit seed.
    """

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    seeds: Tensor


@triton.jit
def is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
    """Whether a row has a threshold."""
    top_k = tl.load(top_ks + row)
    is_limited = (top_k > 0) & (top_k < vocab_size)
    is_limited = is_limited | (tl.load(top_ps + row) < 1) | (tl.load(min_ps + row) > 0)
    return is_limited & (tl.load(temperatures + row) > 0)


@triton.jit
def _weights(x, best, temperature):
    """Probabilities relative to the best token's."""
    return tl.exp2((x - best) * (1.4426950408889634 / temperature))


@triton.jit
def _stats_kernel(
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
        best = tl.max(tl.where(is_finite, x, -3.4028234663852886e38), axis=0)
        least = tl.min(tl.where(is_finite, x, 3.4028234663852886e38), axis=0)
        weights = _weights(tl.where(is_finite, x, best), best, tl.load(temperatures + row))
        total = tl.sum(tl.where(is_finite, weights, 0.0), axis=0)
        out = tile_stats + (place * tl.num_programs(1) + tile) * 3
        tl.store(out, best)
        tl.store(out + 1, least)
        tl.store(out + 2, total)


@triton.jit
def _first_bracket(tile_stats, place, num_tiles, temperature, top_k, top_p, vocab_size, TILES):
    """Everything up to the best logit."""
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    source = tile_stats + (place * num_tiles + tiles) * 3
    bests = tl.load(source, mask=there, other=-3.4028234663852886e38)
    least = tl.min(tl.load(source + 1, mask=there, other=3.4028234663852886e38), axis=0)
    totals = tl.load(source + 2, mask=there, other=0.0)
    best = tl.max(bests, axis=0)
    total = tl.sum(totals * _weights(bests, best, temperature), axis=0)
    is_counted = (top_k > 0) & (top_k < vocab_size)
    target = tl.where(is_counted, top_k.to(tl.float32), top_p * total)
    return -float("inf"), best, 0.0, least, best, target


@triton.jit
def _pivots(low, high, least, best, temperature, IS_FIRST: tl.constexpr):
    """Values from the lower end of a bracket upwards, the upper end itself not among them."""
    bottom = tl.maximum(low, least)
    if IS_FIRST:
        bottom = tl.maximum(bottom, best - _REACH * temperature)
    share = tl.arange(0, _PIVOTS).to(tl.float32) / _PIVOTS
    return tl.minimum(bottom * (1 - share) + high * share, high)


@triton.jit
def _next_bracket(
    bracket, measured, place, num_tiles, temperature, WAS_FIRST: tl.constexpr, TILES: tl.constexpr
):
    """The narrower bracket that the measures at the pivots of a bracket leave."""
    low, high, above, least, best, target = _load_bracket(bracket, place)
    pivots = _pivots(low, high, least, best, temperature, WAS_FIRST)
    tiles = tl.arange(0, TILES)[None, :]
    source = measured + (place * num_tiles + tiles) * _PIVOTS + tl.arange(0, _PIVOTS)[:, None]
    sums = tl.sum(tl.load(source, mask=tiles < num_tiles, other=0.0), axis=1)
    is_enough = sums < target
    next_high = tl.min(tl.where(is_enough, pivots, high), axis=0)
    next_above = tl.max(tl.where(is_enough, sums, above), axis=0)
    next_low = tl.max(tl.where(is_enough, low, pivots), axis=0)
    return next_low, next_high, next_above, least, best, target


@triton.jit
def _load_bracket(bracket, place):
    source = bracket + place * _FIELDS
    low, high, above = tl.load(source), tl.load(source + 1), tl.load(source + 2)
    return low, high, above, tl.load(source + 3), tl.load(source + 4), tl.load(source + 5)


@triton.jit
def _store_bracket(bracket, place, low, high, above, least, best, target):
    out = bracket + place * _FIELDS
    tl.store(out, low)
    tl.store(out + 1, high)
    tl.store(out + 2, above)
    tl.store(out + 3, least)
    tl.store(out + 4, best)
    tl.store(out + 5, target)


@triton.jit
def _measure_kernel(
    measured,
    bracket,
    counts,
    previous_measured,
    previous_bracket,
    tile_stats,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab_size,
    stride,
    IS_FIRST: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
):
    """How much of a tile is above each pivot of the row's bracket."""
    place, tile = tl.program_id(0), tl.program_id(1)
    num_tiles = tl.num_programs(1)
    row = tl.load(rows + place).to(tl.int64)
    if is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
        temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
        top_p = tl.load(top_ps + row)
        if IS_FIRST:
            low, high, above, least, best, target = _first_bracket(
                tile_stats, place, num_tiles, temperature, top_k, top_p, vocab_size, TILES
            )
        else:
            low, high, above, least, best, target = _next_bracket(
                previous_bracket, previous_measured, place, num_tiles, temperature, True, TILES
            )
        if tile == 0:
            _store_bracket(bracket, place, low, high, above, least, best, target)
            tl.store(counts + place, 0)
        is_counted = (top_k > 0) & (top_k < vocab_size)
        if is_counted | (top_p < 1):
            pivots = _pivots(low, high, least, best, temperature, IS_FIRST)
            sums = tl.zeros((_PIVOTS, CHUNK), dtype=tl.float32)
            source = logits + place.to(tl.int64) * stride
            for first in range(tile * TILE, tl.minimum((tile + 1) * TILE, vocab_size), CHUNK):
                token_ids = first + tl.arange(0, CHUNK)
                x = tl.load(source + token_ids, mask=token_ids < vocab_size, other=-float("inf"))
                x = x.to(tl.float32)
                weights = tl.where(is_counted, 1.0, _weights(x, best, temperature))
                sums += tl.where(x[None, :] > pivots[:, None], weights[None, :], 0.0)
            out = measured + (place * num_tiles + tile) * _PIVOTS
            tl.store(out + tl.arange(0, _PIVOTS), tl.sum(sums, axis=1))


@triton.jit
def _collect_kernel(
    collected,
    bracket,
    counts,
    previous_measured,
    previous_bracket,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab_size,
    stride,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Copy the logits inside the bracket together, in any order."""
    place, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + place).to(tl.int64)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    temperature = tl.load(temperatures + row)
    is_counted = (top_k > 0) & (top_k < vocab_size)
    if (is_counted | (top_p < 1)) & (temperature > 0):
        low, high, above, least, best, target = _next_bracket(
            previous_bracket,
            previous_measured,
            place,
            tl.num_programs(1),
            temperature,
            False,
            TILES,
        )
        if tile == 0:
            _store_bracket(bracket, place, low, high, above, least, best, target)
        top = tl.where(is_counted & (top_p < 1), float("inf"), high)
        token_ids = tile * TILE + tl.arange(0, TILE)
        source = logits + place.to(tl.int64) * stride + token_ids
        x = tl.load(source, mask=token_ids < vocab_size, other=-float("inf")).to(tl.float32)
        is_inside = ((x > low) & (x <= top)).to(tl.int32)
        number = tl.sum(is_inside, axis=0)
        if number > 0:
            first = tl.atomic_add(counts + place, number)
            index = first + tl.cumsum(is_inside, axis=0) - 1
            out = collected + place.to(tl.int64) * ROOM + index
            tl.store(out, x, mask=(is_inside > 0) & (index < ROOM))


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
        weights = _weights(tl.where(is_above, x, best), best, temperature) * _FIXED
        amount = tl.where(is_counted, tl.full((CHUNK,), 1, tl.int64), weights.to(tl.int64))
        total += tl.where(is_above, amount, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(
    source, size, low, high, target, best, temperature, is_counted, CHUNK: tl.constexpr
):
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
def _threshold(
    source,
    size,
    low,
    high,
    missing,
    best,
    temperature,
    top_p,
    is_counted,
    CHUNK: tl.constexpr,
):
    """The threshold of top-k, top-p, or top-p of what top-k leaves.

    `missing` is the target less what is above everything in the source.
    """
    scale = tl.where(is_counted, 1.0, _FIXED * 1.0)
    target = (missing * scale).to(tl.int64)
    found = _bisect(
        source, size, _ordered(low), _ordered(high), target, best, temperature, is_counted, CHUNK
    )
    if is_counted & (top_p < 1):
        below = found - 1
        mass = _above(source, size, _float_of(below), best, temperature, False, CHUNK)
        target = (mass.to(tl.float32) * top_p).to(tl.int64)
        found = _bisect(
            source, size, below, _ordered(best), target, best, temperature, False, CHUNK
        )
    return _float_of(found)


@triton.jit
def _threshold_kernel(
    thresholds,
    collected,
    bracket,
    first_bracket,
    counts,
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    vocab_size,
    stride,
    ROOM: tl.constexpr,
):
    place = tl.program_id(0)
    row = tl.load(rows + place).to(tl.int64)
    if is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
        temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
        top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
        best = tl.load(first_bracket + place * _FIELDS + 4)
        is_counted = (top_k > 0) & (top_k < vocab_size)
        threshold = best - float("inf")
        if is_counted | (top_p < 1):
            low, high, above, least, best, target = _load_bracket(bracket, place)
            count = tl.load(counts + place)
            if count <= ROOM:
                above = tl.where(is_counted & (top_p < 1), 0.0, above)
                threshold = _threshold(
                    collected + place.to(tl.int64) * ROOM,
                    count,
                    low,
                    high,
                    target - above,
                    best,
                    temperature,
                    top_p,
                    is_counted,
                    ROOM,
                )
            else:
                threshold = _threshold(
                    logits + place.to(tl.int64) * stride,
                    vocab_size,
                    low,
                    high,
                    target,
                    best,
                    temperature,
                    top_p,
                    is_counted,
                    ROOM,
                )
        threshold = tl.div_rn(threshold, temperature)
        least_share = tl.log(tl.where(min_p > 0, min_p, 1.0))
        floor = tl.where(min_p > 0, tl.div_rn(best, temperature) + least_share, threshold)
        tl.store(thresholds + place, tl.maximum(threshold, floor))


def find_thresholds(logits: Tensor, rows: Tensor, state: SamplingState) -> Tensor:
    """Lowest logit over temperature that stays possible, [N] float32.

    Undefined for rows without top-k, top-p and min-p, and for greedy ones.

    Args:
        logits: [N, V] float32 or bfloat16, each row contiguous.
        rows: [N] int32 of the state.
        state: How every row samples.
    """
    num_rows, vocab_size = logits.shape
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    num_tiles = triton.cdiv(vocab_size, tile)
    tiles = triton.next_power_of_2(num_tiles)
    shared = (logits, rows, *state[:4], vocab_size, logits.stride(0))
    grid = (num_rows, num_tiles)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=logits.device)

    tile_stats, counts, thresholds = new(num_tiles, 3), new(dtype=torch.int32), new()
    measured = [new(num_tiles, _PIVOTS.value) for _ in range(2)]
    brackets = [new(_FIELDS.value) for _ in range(3)]
    collected = new(_ROOM)
    _stats_kernel[grid](tile_stats, *shared, TILE=tile, num_warps=8)
    for i in (0, 1):
        _measure_kernel[grid](
            *(measured[i], brackets[i], counts, measured[0], brackets[0], tile_stats, *shared),
            IS_FIRST=i == 0,
            TILE=tile,
            CHUNK=min(_CHUNK, tile),
            TILES=tiles,
            num_warps=4,
        )
    _collect_kernel[grid](
        *(collected, brackets[2], counts, measured[1], brackets[1], *shared),
        ROOM=_ROOM,
        TILE=tile,
        TILES=tiles,
        num_warps=8,
    )
    _threshold_kernel[(num_rows,)](
        *(thresholds, collected, brackets[2], brackets[0], counts, *shared),
        ROOM=_ROOM,
        num_warps=8,
    )
    return thresholds


def variants() -> tuple[Variant, ...]:
    """For both vocabularies, whose tiles are 32 and 38."""
    return ()
