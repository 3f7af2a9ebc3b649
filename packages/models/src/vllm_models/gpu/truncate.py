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
from vllm_models.gpu.brackets import (
    BEST,
    FIELDS,
    LOWEST,
    PIVOTS,
    STATS,
    first_bracket,
    limits_of,
    load_bracket,
    next_bracket,
    pivots_of,
    stats_kernel,
    store_bracket,
)
from vllm_models.gpu.launch import Variant
from vllm_models.gpu.sampling_state import SamplingState, is_cut, weights

_TILE = 4096
_CHUNK = 512  # of a tile, compared with all pivots at once
_ROOM = 4096  # logits collected per row; with more, the row itself is bisected


@triton.jit
def _measured(
    logits, tile, vocab_size, pivots, best, limits, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """How much of a tile of a row's logits is above each pivot."""
    temperature, _top_k, _top_p, is_counted = limits
    sums = tl.zeros((PIVOTS, CHUNK), dtype=tl.float32)
    for first in range(tile * TILE, tl.minimum((tile + 1) * TILE, vocab_size), CHUNK):
        token_ids = first + tl.arange(0, CHUNK)
        x = tl.load(logits + token_ids, mask=token_ids < vocab_size, other=-float("inf"))
        x = x.to(tl.float32)
        amount = tl.where(is_counted, 1.0, weights(x, best, temperature))
        sums += tl.where(x[None, :] > pivots[:, None], amount[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _measure_kernel(
    measured,
    brackets,
    counts,
    previous_measured,
    previous_brackets,
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
        limits = limits_of(row, temperatures, top_ks, top_ps, vocab_size)
        temperature, _top_k, top_p, is_counted = limits
        if IS_FIRST:
            bracket = first_bracket(tile_stats, place, num_tiles, limits, TILES)
        else:
            bracket = next_bracket(
                previous_brackets, previous_measured, place, num_tiles, temperature, True, TILES
            )
        if tile == 0:
            store_bracket(brackets, place, bracket)
            tl.store(counts + place, 0)
        if is_counted | (top_p < 1):
            pivots = pivots_of(bracket, temperature, IS_FIRST)
            source = logits + place.to(tl.int64) * stride
            sums = _measured(source, tile, vocab_size, pivots, bracket[BEST], limits, TILE, CHUNK)
            out = measured + (place * num_tiles + tile) * PIVOTS
            tl.store(out + tl.arange(0, PIVOTS), sums)


@triton.jit
def _collect_kernel(
    collected,
    brackets,
    counts,
    previous_measured,
    previous_brackets,
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
    num_tiles = tl.num_programs(1)
    row = tl.load(rows + place).to(tl.int64)
    limits = limits_of(row, temperatures, top_ks, top_ps, vocab_size)
    temperature, _top_k, top_p, is_counted = limits
    has_some = is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size)
    if has_some & (is_counted | (top_p < 1)):
        bracket = next_bracket(
            previous_brackets, previous_measured, place, num_tiles, temperature, False, TILES
        )
        if tile == 0:
            store_bracket(brackets, place, bracket)
        top = tl.where(is_counted & (top_p < 1), float("inf"), bracket[1])
        token_ids = tile * TILE + tl.arange(0, TILE)
        source = logits + place.to(tl.int64) * stride + token_ids
        x = tl.load(source, mask=token_ids < vocab_size, other=-float("inf")).to(tl.float32)
        is_inside = ((x > bracket[0]) & (x <= top)).to(tl.int32)
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
    brackets,
    first_brackets,
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
    """Bisect what was collected, or all logits of a row, and add the floor of min-p."""
    place = tl.program_id(0)
    row = tl.load(rows + place).to(tl.int64)
    if is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size):
        limits = limits_of(row, temperatures, top_ks, top_ps, vocab_size)
        temperature, _top_k, top_p, is_counted = limits
        min_p = tl.load(min_ps + row)
        best = tl.load(first_brackets + place * FIELDS + BEST)
        threshold = best - float("inf")
        if is_counted | (top_p < 1):
            bracket = load_bracket(brackets, place)
            count = tl.load(counts + place)
            if count <= ROOM:
                some = collected + place.to(tl.int64) * ROOM
                above = tl.where(is_counted & (top_p < 1), 0.0, bracket[2])
                threshold = threshold_of(some, count, bracket, above, limits, ROOM)
            else:
                every = logits + place.to(tl.int64) * stride
                threshold = threshold_of(every, vocab_size, bracket, 0.0, limits, ROOM)
        least_share = tl.log(tl.where(min_p > 0, min_p, 1.0))
        floor = tl.where(min_p > 0, best + temperature * least_share, threshold)
        threshold = tl.where(best > LOWEST, tl.maximum(threshold, floor), -float("inf"))
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

    tile_stats, counts, thresholds = new(num_tiles, STATS.value), new(dtype=torch.int32), new()
    measured = [new(num_tiles, PIVOTS.value) for _ in range(2)]
    brackets = [new(FIELDS.value) for _ in range(3)]
    collected = new(_ROOM)
    stats_kernel[grid](tile_stats, *shared, TILE=tile, num_warps=8)
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
            _variant(f"stats-{dtype}", stats_kernel, dtype, {"TILE": _TILE}, 8),
            _variant(f"threshold-{dtype}", _threshold_kernel, dtype, {"ROOM": _ROOM}, 8),
            *(v for size in sorted(sizes) for v in _of_tiles(dtype, *size)),
        )
    )


def _of_tiles(dtype: str, vocab_size: int, tiles: int) -> tuple[Variant, ...]:
    """The kernels that read what every tile measured."""
    name, shared = f"{vocab_size}-{dtype}", {"TILE": _TILE, "TILES": tiles}
    first, second = (
        {"IS_FIRST": is_first, "CHUNK": _CHUNK, **shared} for is_first in (True, False)
    )
    return (
        _variant(f"measure_first-{name}", _measure_kernel, dtype, first, 4),
        _variant(f"measure_second-{name}", _measure_kernel, dtype, second, 4),
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
