"""Attention of sequences with one query or a few, which is reading keys and values.

q [T, H, D]; keys [B, K, P, D]; values [B, K, P, W] -> out [T, H, W]. An item of work is a chunk of
a context and a KV head: its rows m = query * G + h are the queries and the G heads that share the
KV head (or some of them, if they are many). A fixed number of programs walks over the items that
`paged_chunks` has listed. Where a context has several chunks, each leaves

    partials[item, head, m] = sum_p 2^(s_p - largest_m) v_p    and    largest_m, total_m

and a second kernel adds them up in their order.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.paged_chunks import (
    ITEM,
    base_for,
    chunk_start,
    most_chunks,
)
from vllm_models.gpu.paged_shapes import POOLS, SHAPES, Shape, sizes
from vllm_models.gpu.paged_tile import (
    Scoring,
    as_stored,
    attend_tile,
    load_part,
    store_part,
    with_sink,
)
from vllm_models.gpu.spans import Chunks, GpuSpans

_TILE_BYTES = 32768  # of keys and values
_OTHER_BYTES = 8192  # of shared memory, for queries and weights
_MAX_WARPS = 8  # on a multiprocessor: with 255 registers each


@triton.jit
def _rows_of(start, queries, part, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Query and head of the group of every row, and which rows are there."""
    row = tl.arange(0, ROWS)
    query, head = row // HEADS, part * HEADS + row % HEADS
    return start + query, head, query, (query < queries) & (head < GROUP)


@triton.jit
def _decode_kernel(
    out,
    partials,
    sums,
    q,
    keys,
    key_scales,
    values,
    value_scales,
    items,
    count,
    tables,
    sinks,
    scale,
    soft_cap,
    window,
    q_stride,
    table_stride,
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
    BASE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    total_work = tl.load(count) * (NUM_KV_HEADS * PARTS)
    for work in range(tl.program_id(0), total_work, tl.num_programs(0)):
        item = items + (work // (NUM_KV_HEADS * PARTS)) * ITEM
        kv_head, part = work % (NUM_KV_HEADS * PARTS) // PARTS, work % PARTS
        start, queries, row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        length, chunk, is_only = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        token, head, query, there = _rows_of(start, queries, part, GROUP, HEADS, ROWS)
        place = token.to(tl.int64) * q_stride + (kv_head * GROUP + head) * DIM
        q_main = load_part(q, place, there, 1, 0, MAIN, DIM, True)
        q_rest = q_main
        if REST > 0:
            q_rest = load_part(q, place, there, 1, MAIN, REST, DIM, True)
        high = length - queries + query + 1
        low = high - window
        first = chunk_start(chunk, BASE)
        end = tl.minimum(chunk_start(chunk + 1, BASE), length)
        if HAS_WINDOW:
            seen = tl.maximum(length - queries + 1 - window, 0)
            first = tl.maximum(first, seen // TILE * TILE)
        table = tables + row.to(tl.int64) * table_stride
        acc = tl.zeros([ROWS, VALUE_MAIN], dtype=tl.float32)
        acc_rest = tl.zeros([ROWS, VALUE_REST if VALUE_REST > 0 else 1], dtype=tl.float32)
        largest = tl.full([ROWS], -1.0e30, dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for position in tl.range(first, end, TILE, num_stages=STAGES):
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
                True,
            )
        if is_only != 0:
            heads = kv_head * GROUP + head
            acc, acc_rest, total = with_sink(acc, acc_rest, largest, total, sinks, heads, there)
            total = tl.where(there, total, 1.0)
            places = token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
            element = out.dtype.element_ty
            main = (acc / total[:, None]).to(element)
            store_part(out, places, there, main, VALUE_DIM, 0, VALUE_MAIN)
            if VALUE_REST > 0:
                rest = (acc_rest / total[:, None]).to(element)
                store_part(out, places, there, rest, VALUE_DIM, VALUE_MAIN, VALUE_REST)
        else:
            places = tl.arange(0, ROWS) + work * tl.full([1], ROWS, dtype=tl.int64)
            store_part(partials, places, there, acc, VALUE_DIM, 0, VALUE_MAIN)
            if VALUE_REST > 0:
                store_part(partials, places, there, acc_rest, VALUE_DIM, VALUE_MAIN, VALUE_REST)
            tl.store(sums + 2 * places, largest, mask=there)
            tl.store(sums + 2 * places + 1, total, mask=there)


@triton.jit
def _reduce_kernel(
    out,
    partials,
    sums,
    items,
    ends,
    sinks,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    USED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    before, after = tl.load(ends + tl.program_id(0)), tl.load(ends + tl.program_id(0) + 1)
    if after - before > 1:
        kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
        start = tl.load(items + before * ITEM)
        queries = tl.load(items + before * ITEM + 1)
        token, head, _query, there = _rows_of(start, queries, part, GROUP, HEADS, USED)
        columns = tl.arange(0, WIDTH)
        mask = there[:, None] & (columns < VALUE_DIM)[None, :]
        acc = tl.zeros([USED, WIDTH], dtype=tl.float32)
        largest = tl.full([USED], -1.0e30, dtype=tl.float32)
        total = tl.zeros([USED], dtype=tl.float32)
        for item in range(before, after):
            work = item * tl.full([1], NUM_KV_HEADS * PARTS, dtype=tl.int64) + tl.program_id(1)
            places = work * ROWS + tl.arange(0, USED)
            pointers = partials + places[:, None] * VALUE_DIM + columns[None, :]
            added = tl.load(pointers, mask=mask, other=0.0)
            its_largest = tl.load(sums + 2 * places, mask=there, other=0.0)
            its_total = tl.load(sums + 2 * places + 1, mask=there, other=1.0)
            above = tl.maximum(largest, its_largest)
            shrink, its_shrink = tl.exp2(largest - above), tl.exp2(its_largest - above)
            acc = acc * shrink[:, None] + added * its_shrink[:, None]
            total = total * shrink + its_total * its_shrink
            largest = above
        heads = kv_head * GROUP + head
        acc, acc, total = with_sink(acc, acc, largest, total, sinks, heads, there)
        total = tl.where(there, total, 1.0)
        places = token.to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
        done = (acc / total[:, None]).to(out.dtype.element_ty)
        store_part(out, places, there, done, VALUE_DIM, 0, WIDTH)


class Tiling(NamedTuple):
    """How a decode kernel is compiled.

    Attributes:
        tile: Positions read together.
        num_stages: Of the pipeline: two for each tile in flight, since places are read before.
        num_warps: Of a program.
        num_bytes: Of the tiles in flight, the one that is computed counted.
    """

    tile: int
    num_stages: int
    num_warps: int
    num_bytes: int

    def programs(self, device: torch.device) -> int:
        """How many a device holds at a time; the interpreter's take turns."""
        if device.type != "cuda":
            return 1
        chip = torch.cuda.get_device_properties(device)
        fitting = chip.shared_memory_per_multiprocessor // (self.num_bytes + _OTHER_BYTES)
        return chip.multi_processor_count * max(1, min(fitting, _MAX_WARPS // self.num_warps))


def tile_for(dim: int, value_dim: int, itemsize: int, is_shared: bool) -> Tiling:
    """Tiles of about the same bytes; those of narrow types are smaller and more are in flight.

    Args:
        dim: Of a key head.
        value_dim: Of a value head.
        itemsize: Bytes of a number.
        is_shared: Values are read from the keys.
    """
    position = (dim if is_shared else dim + value_dim) * itemsize
    tiles, size, most = (3, _TILE_BYTES // 2, 64) if itemsize == 1 else (2, _TILE_BYTES, 256)
    tile = min(most, max(16, 1 << round(math.log2(size / position))))
    return Tiling(tile, 2 * tiles + 1, 8 if value_dim > 256 else 4, tiles * tile * position)


def decode(
    out: Tensor,
    q: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    spans: GpuSpans,
    chunks: Chunks,
    scoring: Scoring,
) -> None:
    """Attend from the queries of all sequences that have chunks.

    Args:
        out: [T, H, W]; queries of other sequences are left alone.
        q: [T, H, D], heads side by side.
        keys: [B, K, P, D] and scales [B, K, P].
        values: [B, K, P, W], likewise; a part of the keys if they are read from there.
        spans: Of the step.
        chunks: Of the step.
        scoring: Of the layer.
    """
    known = sizes(keys[0], values[0])
    group, value_dim = q.shape[1] // keys[0].shape[1], values[0].shape[3]
    heads, rows = _rows(group, chunks.max_queries, value_dim)
    parts = keys[0].shape[1] * triton.cdiv(group, heads)
    packing = {"NUM_KV_HEADS": keys[0].shape[1], "GROUP": group, "HEADS": heads, "ROWS": rows}
    tiling = tile_for(q.shape[2], value_dim, keys[0].itemsize, bool(known["IS_SHARED"]))
    most = most_chunks(spans.max_length, spans.window, chunks.base)
    split = len(chunks.items) * parts * rows if most > 1 else 0
    partials = torch.empty((split, value_dim), dtype=torch.float32, device=q.device)
    sums = torch.empty((split, 2), dtype=torch.float32, device=q.device)
    programs = min(len(chunks.items) * parts, _programs(tiling, q.device))
    _decode_kernel[(programs,)](
        *(out, partials, sums, q, as_stored(keys[0]), keys[1], as_stored(values[0]), values[1]),
        *(chunks.items, chunks.ends[-1:], spans.tables, scoring.sinks, *scoring.factors),
        *(spans.window, q.stride(0), spans.tables.stride(0)),
        HAS_WINDOW=spans.window > 0,
        HAS_CAP=scoring.soft_cap > 0,
        **(known | packing),
        BASE=chunks.base,
        TILE=tiling.tile,
        STAGES=tiling.num_stages,
        num_warps=tiling.num_warps,
    )
    if most > 1:
        _reduce_kernel[(len(spans.rows), parts)](
            *(out, partials, sums, chunks.items, chunks.ends, scoring.sinks),
            **packing,
            USED=heads * chunks.max_queries,
            VALUE_DIM=value_dim,
            WIDTH=triton.next_power_of_2(value_dim),
            num_warps=_reduce_warps(heads * chunks.max_queries, value_dim),
        )


def _rows(group: int, max_queries: int, value_dim: int) -> tuple[int, int]:
    """Heads and rows of an item: as many as registers hold sums of."""
    heads = min(triton.next_power_of_2(group), 32 if value_dim > 256 else 64)
    return heads, max(16, heads * max_queries)


def _reduce_warps(rows: int, value_dim: int) -> int:
    return min(16, max(1, rows * triton.next_power_of_2(value_dim) // 512))


_programs = functools.cache(Tiling.programs)  # a device's properties take their time


def variants() -> tuple[Variant, ...]:
    """Of every family of shapes, with keys and values of 16 and of 8 bits."""
    forms = [_variant(shape, pool) for shape in SHAPES for pool in POOLS]
    return (*forms, *(_reduce_variant(shape) for shape in SHAPES))


def _variant(shape: Shape, pool: str) -> Variant:
    heads, rows = _rows(shape.group, 1, shape.value_dim)
    itemsize = 2 if pool == "bf16" else 1
    tiling = tile_for(shape.dim, shape.value_dim, itemsize, shape.is_shared)
    integers = ("window", "q_stride", "table_stride")
    signature, constants = shape.arguments(pool)
    signature |= {
        **dict.fromkeys(("partials", "sums"), "*fp32"),
        **dict.fromkeys(("items", "count"), "*i32"),
        **dict.fromkeys(integers, "i32"),
    }
    constants |= {"HEADS": heads, "ROWS": rows, "BASE": base_for(shape.group)}
    constants |= {"TILE": tiling.tile, "STAGES": tiling.num_stages}
    name = f"paged_decode-{pool}-{shape.name}"
    stages = tiling.num_stages
    return Variant(name, _decode_kernel, signature, constants, tiling.num_warps, stages, True)


def _reduce_variant(shape: Shape) -> Variant:
    heads, rows = _rows(shape.group, 1, shape.value_dim)
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("partials", "sums"), "*fp32"),
        **dict.fromkeys(("items", "ends"), "*i32"),
        **({"sinks": "*bf16"} if shape.has_sinks else {}),
    }
    constants = {
        **({} if shape.has_sinks else {"sinks": None}),
        **{"NUM_KV_HEADS": shape.num_kv_heads, "GROUP": shape.group, "HEADS": heads, "ROWS": rows},
        "USED": heads,
        "VALUE_DIM": shape.value_dim,
        "WIDTH": triton.next_power_of_2(shape.value_dim),
    }
    warps = _reduce_warps(heads, shape.value_dim)
    name = f"paged_reduce-{shape.name}"
    return Variant(name, _reduce_kernel, signature, constants, warps, no_spills=True)
