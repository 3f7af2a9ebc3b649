"""Attention of sequences with many queries, which is multiplying matrices.

q [T, H, D]; keys [B, K, P, D]; values [B, K, P, W] -> out [T, H, W]. A program has some queries of
a sequence and the G heads that share a KV head as its rows m = query * G + h. It walks over the
context up to its last query, without masks where every row sees every position.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.paged_shapes import POOLS, SHAPES, Shape, sizes
from vllm_models.gpu.paged_tile import (
    Scoring,
    as_stored,
    attend_tile,
    load_part,
    store_part,
    with_sink,
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
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    LOOK: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    QUERIES: tl.constexpr = ROWS // HEADS
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later queries see more: first
    kv_head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    sequence = _sequence_of(tile, starts, num_sequences, QUERIES, LOOK)
    start = tl.load(starts + sequence)
    queries = tl.load(starts + sequence + 1) - start
    first_query = (tile - start // QUERIES - sequence) * QUERIES
    if (first_query < queries) & (queries > few):
        length = tl.load(lengths + sequence)
        table = tables + tl.load(rows + sequence).to(tl.int64) * table_stride
        row = tl.arange(0, ROWS)
        query, head = first_query + row // HEADS, part * HEADS + row % HEADS
        there = (query < queries) & (head < GROUP)
        heads = kv_head * GROUP + head
        place = (start + query).to(tl.int64) * q_stride + heads * DIM
        q_main = load_part(q, place, there, 1, 0, MAIN, DIM, True)
        q_rest = q_main
        if REST > 0:
            q_rest = load_part(q, place, there, 1, MAIN, REST, DIM, True)
        before = length - queries
        high = before + query + 1
        low = high - window
        acc = tl.zeros([ROWS, VALUE_MAIN], dtype=tl.float32)
        acc_rest = tl.zeros([ROWS, VALUE_REST if VALUE_REST > 0 else 1], dtype=tl.float32)
        largest = tl.full([ROWS], -1.0e30, dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        end = tl.minimum(before + first_query + QUERIES, length)
        full_end = (before + first_query + 1) // TILE * TILE
        first, full_first = 0, 0
        if HAS_WINDOW:
            first = tl.maximum(before + first_query + 1 - window, 0) // TILE * TILE
            full_first = tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE
            full_first = tl.minimum(full_first, tl.cdiv(end, TILE) * TILE)
            full_end = tl.maximum(full_end, full_first)
        for stretch in tl.static_range(0 if HAS_WINDOW else 1, 3):
            from_here = first if stretch == 0 else (full_first if stretch == 1 else full_end)
            to_here = full_first if stretch == 0 else (full_end if stretch == 1 else end)
            for position in tl.range(from_here, to_here, TILE, num_stages=STAGES):
                acc, acc_rest, largest, total = attend_tile(
                    acc,
                    acc_rest,
                    largest,
                    total,
                    q_main,
                    q_rest,
                    keys,
                    key_scales,
                    values,
                    value_scales,
                    table,
                    position,
                    end,
                    low,
                    high,
                    kv_head,
                    scale,
                    soft_cap,
                    HAS_WINDOW,
                    HAS_CAP,
                    IS_SHARED,
                    NUM_KV_HEADS,
                    BLOCK_SIZE,
                    DIM,
                    MAIN,
                    REST,
                    VALUE_DIM,
                    VALUE_STRIDE,
                    VALUE_MAIN,
                    VALUE_REST,
                    TILE,
                    stretch != 1,
                )
        acc, acc_rest, total = with_sink(acc, acc_rest, largest, total, sinks, heads, there)
        total = tl.where(there, total, 1.0)
        places = (start + query).to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
        element = out.dtype.element_ty
        store_part(out, places, there, (acc / total[:, None]).to(element), VALUE_DIM, 0, VALUE_MAIN)
        if VALUE_REST > 0:
            rest = (acc_rest / total[:, None]).to(element)
            store_part(out, places, there, rest, VALUE_DIM, VALUE_MAIN, VALUE_REST)


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


def prefill_tile_for(dim: int, value_dim: int, itemsize: int) -> Tiling:
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
    known, num_kv_heads = sizes(keys[0], values[0]), keys[0].shape[1]
    group, num_sequences = q.shape[1] // num_kv_heads, len(spans.rows)
    tiling = prefill_tile_for(q.shape[2], values[0].shape[3], keys[0].itemsize)
    heads = min(triton.next_power_of_2(group), tiling.rows)
    tiles = len(q) // (tiling.rows // heads) + num_sequences
    _prefill_kernel[(num_kv_heads * triton.cdiv(group, heads), tiles)](
        *(out, q, as_stored(keys[0]), keys[1], as_stored(values[0]), values[1]),
        *(spans.rows, spans.starts, spans.lengths, spans.tables, scoring.sinks, *scoring.factors),
        *(spans.window, q.stride(0), spans.tables.stride(0), num_sequences, few),
        HAS_WINDOW=spans.window > 0,
        HAS_CAP=scoring.soft_cap > 0,
        **known,
        GROUP=group,
        HEADS=heads,
        ROWS=tiling.rows,
        TILE=tiling.tile,
        STAGES=tiling.num_stages,
        LOOK=_LOOK,
        num_warps=tiling.num_warps,
    )


def variants() -> tuple[Variant, ...]:
    """Of every family of shapes, with keys and values of 16 and of 8 bits."""
    return tuple(_variant(shape, pool) for shape in SHAPES for pool in POOLS)


def _variant(shape: Shape, pool: str) -> Variant:
    tiling = prefill_tile_for(shape.dim, shape.value_dim, 2 if pool == "bf16" else 1)
    heads = min(triton.next_power_of_2(shape.group), tiling.rows)
    signature, constants = shape.arguments(pool)
    numbers = ("window", "q_stride", "table_stride", "num_sequences", "few")
    signature |= dict.fromkeys(("rows", "starts", "lengths"), "*i32") | dict.fromkeys(
        numbers, "i32"
    )
    constants |= {"HEADS": heads, "ROWS": tiling.rows, "TILE": tiling.tile}
    constants |= {"STAGES": tiling.num_stages, "LOOK": _LOOK}
    return Variant(
        f"paged_prefill-{pool}-{shape.name}",
        _prefill_kernel,
        signature,
        constants,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
