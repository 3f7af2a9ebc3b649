"""Top-k, top-p and min-p as one threshold per row, found without sorting the vocabulary.

    above(t)  = number (top-k) or probability mass (top-p) of the logits greater than t
    threshold = smallest logit t of the row with above(t) < k, or < p of the mass

so tokens of equal logit stay or go together. Two passes of 16 pivots each narrow down where the
threshold is, a third collects the few logits in between, and one program per row bisects those on
the bits of the float. With top-k and top-p both, the passes look for top-k and everything from
there up is collected. Rows that need no threshold leave each kernel at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.bisect_bits import threshold_of
from vllm_models.gpu.launch import Variant
from vllm_models.gpu.sampling_state import SamplingState, is_cut, weights

_TILE = 4096
_CHUNK = 512  # of a tile, compared with all pivots at once
_ROOM = 4096  # logits collected per row; with more, the row itself is bisected

_PIVOTS = tl.constexpr(16)
_REACH = tl.constexpr(32.0)  # of the first pivots below the best, in units of temperature
_FIELDS = tl.constexpr(8)  # of a bracket: low, high, above high, least, best, target
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # of all finite logits


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
        best = tl.max(tl.where(is_finite, x, _LOWEST), axis=0)
        least = tl.min(tl.where(is_finite, x, -_LOWEST), axis=0)
        mass = weights(tl.where(is_finite, x, best), best, tl.load(temperatures + row))
        total = tl.sum(tl.where(is_finite, mass, 0.0), axis=0)
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
    bests = tl.load(source, mask=there, other=_LOWEST)
    least = tl.min(tl.load(source + 1, mask=there, other=-_LOWEST), axis=0)
    totals = tl.load(source + 2, mask=there, other=0.0)
    best = tl.max(bests, axis=0)
    bests = tl.where(totals > 0, bests, best)
    total = tl.sum(totals * weights(bests, best, temperature), axis=0)
    is_counted = (top_k > 0) & (top_k < vocab_size)
    target = tl.where(is_counted, top_k.to(tl.float32), top_p * total)
    return -float("inf"), best, 0.0, least, best, target


@triton.jit
def _pivots(low, high, least, best, temperature, IS_FIRST: tl.constexpr):
    """Values from the lower end of a bracket upwards, the upper end itself not among them.

    The kernel that measures and the one that reads the measures must get the same bits, however
    their compilations join products and sums: each step here has one rounding.
    """
    bottom = tl.maximum(tl.maximum(low, least), tl.maximum(high, 0.0) + _LOWEST)
    if IS_FIRST:
        bottom = tl.maximum(bottom, best - _REACH * temperature)
    bottom = tl.minimum(bottom, high)
    share = tl.arange(0, _PIVOTS).to(tl.float32) / _PIVOTS
    return tl.minimum(tl.fma(share, high - bottom, bottom), high)


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
                amount = tl.where(is_counted, 1.0, weights(x, best, temperature))
                sums += tl.where(x[None, :] > pivots[:, None], amount[None, :], 0.0)
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
            low, high, above, _least, best, target = _load_bracket(bracket, place)
            count = tl.load(counts + place)
            if count <= ROOM:
                above = tl.where(is_counted & (top_p < 1), 0.0, above)
                threshold = threshold_of(
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
                threshold = threshold_of(
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
        least_share = tl.log(tl.where(min_p > 0, min_p, 1.0))
        floor = tl.where(min_p > 0, best + temperature * least_share, threshold)
        threshold = tl.where(best > _LOWEST, tl.maximum(threshold, floor), -float("inf"))
        tl.store(thresholds + place, threshold)


def find_thresholds(logits: Tensor, rows: Tensor, state: SamplingState) -> Tensor:
    """Lowest logit that stays possible, [N] float32.

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
    """For both vocabularies and types of logits."""
    sizes = {(v, triton.next_power_of_2(triton.cdiv(v, _TILE))) for v in (128256, 151936)}
    return tuple(
        variant
        for dtype in ("fp32", "bf16")
        for variant in (
            _variant(f"stats-{dtype}", _stats_kernel, dtype, {"TILE": _TILE}, 8),
            _variant(f"threshold-{dtype}", _threshold_kernel, dtype, {"ROOM": _ROOM}, 8),
            *(v for size in sorted(sizes) for v in _of_tiles(dtype, *size)),
        )
    )


def _of_tiles(dtype: str, vocab_size: int, tiles: int) -> tuple[Variant, ...]:
    """The kernels that read what every tile measured."""
    name, shared = f"{vocab_size}-{dtype}", {"TILE": _TILE, "TILES": tiles}
    passes = (("first", True), ("second", False))
    return (
        *(
            _variant(
                f"measure_{which}-{name}",
                _measure_kernel,
                dtype,
                {"IS_FIRST": is_first, "CHUNK": _CHUNK, **shared},
                4,
            )
            for which, is_first in passes
        ),
        _variant(f"collect-{name}", _collect_kernel, dtype, {"ROOM": _ROOM, **shared}, 8),
    )


def _variant(
    name: str, kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int
) -> Variant:
    types = {
        "logits": f"*{dtype}",
        **dict.fromkeys(("rows", "top_ks", "counts"), "*i32"),
        **dict.fromkeys(("vocab_size", "stride"), "i32"),
    }
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {argument: types.get(argument, "*fp32") for argument in arguments}
    no_spills = kernel is not _threshold_kernel  # four numbers of a kernel that reads little
    return Variant(f"truncate_{name}", kernel, signature, constants, num_warps, no_spills=no_spills)
