"""Attention of sequences with many queries, which is multiplying matrices.

q [T, H, D]; keys [B, K, P, D]; values [B, K, P, W] -> out [T, H, W]. A program has some queries of
a sequence and the G heads that share a KV head as its rows m = query * G + h. It walks over the
context up to its last query, without masks where every row sees every position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.paged_kv import as_stored
from vllm_models.gpu.paged_shapes import POOLS, SHAPES, Shape, Sizes, sizes
from vllm_models.gpu.paged_tile import (
    Scoring,
    attend_tile,
    load_queries,
    no_sums,
    rows_of,
    store_answers,
)
from vllm_models.gpu.spans import GpuSpans

_LOOK = 256  # sequences looked at together


@triton.jit
def _sequence_of(tile, starts, num_sequences, QUERIES: tl.constexpr, LOOK: tl.constexpr):
    """The sequence of a tile of queries: sequence s has those from starts[s] // QUERIES + s."""
    found = -1
    for base in range(0, num_sequences, LOOK):
        index = base + tl.arange(0, LOOK)
        there = index < num_sequences
        first = tl.load(starts + index, mask=there, other=0) // QUERIES + index
        found += tl.sum((there & (first <= tile)).to(tl.int32))
    return found


@triton.jit
def _stretches(first_query, before, length, window, SIZES: tl.constexpr):
    """Of the positions that some queries see, which is cut in three: where it begins, where every
    row sees all, where the masks begin again, and the end. The first part is for windows.
    """
    TILE: tl.constexpr = SIZES.tile
    end = tl.minimum(before + first_query + SIZES.queries, length)
    full_end = (before + first_query + 1) // TILE * TILE
    first, full_first = 0, 0
    if SIZES.has_window:
        first = tl.maximum(before + first_query + 1 - window, 0) // TILE * TILE
        full_first = tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE
        full_first = tl.minimum(full_first, tl.cdiv(end, TILE) * TILE)
        full_end = tl.maximum(full_end, full_first)
    return first, full_first, full_end, end


@triton.jit(do_not_specialize=["num_sequences", "few"])
def _prefill_kernel(
    out,
    q,
    keys,
    key_scales,
    values,
    value_scales,
    rows,
    starts,
    lengths,
    tables,
    sinks,
    scale,
    soft_cap,
    window,
    q_stride,
    table_stride,
    num_sequences,
    few,
    SIZES: tl.constexpr,
    LOOK: tl.constexpr,
):
    VALUES: tl.constexpr = SIZES.values
    QUERIES: tl.constexpr = SIZES.queries
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later queries see more: first
    kv_head, part = tl.program_id(0) // SIZES.parts, tl.program_id(0) % SIZES.parts
    sequence = _sequence_of(tile, starts, num_sequences, QUERIES, LOOK)
    start = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - start
    first_query = (tile - start // QUERIES - sequence) * QUERIES
    if (first_query < queries) & (queries > few):
        length = tl.load(lengths + sequence)
        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
        query, heads, there = rows_of(first_query, queries, kv_head, part, SIZES.rows, SIZES)
        q_parts = load_queries(q, start + query, q_stride, heads, there, SIZES)
        before = length - queries
        high = before + query + 1
        edges = _stretches(first_query, before, length, window, SIZES)
        sums = no_sums(SIZES.rows, VALUES)
        for i in tl.static_range(0 if SIZES.has_window else 1, 3):
            for position in tl.range(
                edges[i], edges[i + 1], SIZES.tile, num_stages=SIZES.num_stages
            ):
                sums = attend_tile(
                    *(sums, q_parts, (keys, key_scales), (values, value_scales), table, kv_head),
                    *(position, edges[3], (high - window, high), (scale, soft_cap)),
                    *(SIZES, i != 1),
                )
        store_answers(out, sums, sinks, start + query, heads, there, SIZES)


class Tiling(NamedTuple):
    """How a prefill kernel is compiled.

    Attributes:
        rows: Queries times heads of a program.
        tile: Positions read together.
        num_stages: Of the pipeline: two for each tile in flight, since places are read before.
        num_warps: Of a program.
    """

    rows: int
    tile: int
    num_stages: int
    num_warps: int


def _tiling_for(dim: int, value_dim: int, itemsize: int) -> Tiling:
    """As many rows and positions as registers and shared memory hold.

    Args:
        dim: Of a key head.
        value_dim: Of a value head.
        itemsize: Bytes of a number.
    """
    wide = max(dim, value_dim)
    if itemsize == 4:
        return Tiling(64, 32, 3, 8) if wide <= 256 else Tiling(16, 16, 3, 8)
    if wide <= 128:
        return Tiling(128, 64, 5, 8)
    if wide <= 256:
        return Tiling(128, 32, 2, 8) if itemsize == 2 else Tiling(64, 64, 3, 8)
    return Tiling(32, 64, 3, 8)


def prefill(
    out: Tensor,
    q: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    spans: GpuSpans,
    scoring: Scoring,
    few: int,
) -> None:
    """Attend from the queries of all sequences with more than a few of them.

    Args:
        out: [T, H, W]; queries of other sequences are left alone.
        q: [T, H, D], heads side by side.
        keys: [B, K, P, D] and scales [B, K, P].
        values: [B, K, P, W], likewise; a part of the keys if they are read from there.
        spans: Of the step.
        scoring: Of the layer.
        few: Queries.
    """
    layer = sizes(keys[0], values[0], q.shape[1], spans.window > 0, scoring.soft_cap > 0)
    known, tiling = _for_queries(layer, keys[0].itemsize)
    num_sequences = len(spans.rows)
    tiles = len(q) // known.queries + num_sequences
    _prefill_kernel[(layer.num_kv_heads * known.parts, tiles)](
        *(out, q, as_stored(keys[0]), keys[1], as_stored(values[0]), values[1]),
        *(spans.rows, spans.starts, spans.lengths, spans.tables, scoring.sinks, *scoring.factors),
        *(spans.window, q.stride(0), spans.tables.stride(0), num_sequences, few),
        SIZES=known,
        LOOK=_LOOK,
        num_warps=tiling.num_warps,
    )


def _for_queries(layer: Sizes, itemsize: int) -> tuple[Sizes, Tiling]:
    tiling = _tiling_for(layer.keys.width, layer.values.width, itemsize)
    heads = min(triton.next_power_of_2(layer.group), tiling.rows)
    known = replace(
        layer, heads=heads, rows=tiling.rows, tile=tiling.tile, num_stages=tiling.num_stages
    )
    return known, tiling


def variants() -> tuple[Variant, ...]:
    """Of every family of shapes, with keys and values of 16 and of 8 bits."""
    return tuple(_variant(shape, pool) for shape in SHAPES for pool in POOLS)


def _variant(shape: Shape, pool: str) -> Variant:
    known, tiling = _for_queries(shape.sizes, 2 if pool == "bf16" else 1)
    signature, absent = shape.arguments(pool)
    numbers = ("window", "q_stride", "table_stride", "num_sequences", "few")
    signature |= dict.fromkeys(("rows", "starts", "lengths"), "*i32") | dict.fromkeys(
        numbers, "i32"
    )
    constants = {**absent, "SIZES": known, "LOOK": _LOOK}
    return Variant(
        f"paged_prefill-{pool}-{shape.name}",
        _prefill_kernel,
        signature,
        constants,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
