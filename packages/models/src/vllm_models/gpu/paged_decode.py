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
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.paged_chunks import ITEM, base_for, chunk_start, most_chunks
from vllm_models.gpu.paged_kv import as_stored, store_head
from vllm_models.gpu.paged_shapes import POOLS, SHAPES, Head, Shape, Sizes, sizes
from vllm_models.gpu.paged_tile import (
    Scoring,
    attend_tile,
    load_queries,
    no_sums,
    rows_of,
    store_answers,
)
from vllm_models.gpu.spans import Chunks, GpuSpans

_TILE_BYTES = 32768  # of keys and values
_OTHER_BYTES = 8192  # of shared memory, for queries and weights
_MAX_WARPS = 8  # on a multiprocessor: with 255 registers each


@triton.jit
def _bounds(chunk, length, queries, window, BASE: tl.constexpr, SIZES: tl.constexpr):
    """First position of a chunk that some query sees, and the end of the chunk."""
    first = chunk_start(chunk, BASE)
    if SIZES.has_window:
        seen = tl.maximum(length - queries + 1 - window, 0)
        first = tl.maximum(first, seen // SIZES.tile * SIZES.tile)
    return first, tl.minimum(chunk_start(chunk + 1, BASE), length)


@triton.jit
def _store_partials(partials, sums, attended, work, there, SIZES: tl.constexpr):
    """Leave what the rows of an item have attended to for `_reduce_kernel`."""
    VALUES: tl.constexpr = SIZES.values
    acc, rest, largest, total = attended
    places = tl.arange(0, SIZES.rows) + work * tl.full([1], SIZES.rows, dtype=tl.int64)
    store_head(partials, places, there, acc, rest, VALUES)
    tl.store(sums + 2 * places, largest, mask=there)
    tl.store(sums + 2 * places + 1, total, mask=there)


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
    SIZES: tl.constexpr,
    BASE: tl.constexpr,
):
    PAIRS: tl.constexpr = SIZES.num_kv_heads * SIZES.parts
    VALUES: tl.constexpr = SIZES.values
    for work in range(tl.program_id(0), tl.load(count) * PAIRS, tl.num_programs(0)):
        item = items + (work // PAIRS) * ITEM
        kv_head, part = work % PAIRS // SIZES.parts, work % SIZES.parts
        start, queries, row = tl.load(item), tl.load(item + 1), tl.load(item + 2)
        length, chunk, is_only = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
        query, heads, there = rows_of(0, queries, kv_head, part, SIZES.rows, SIZES)
        q_parts = load_queries(q, start + query, q_stride, heads, there, SIZES)
        high = length - queries + query + 1
        first, end = _bounds(chunk, length, queries, window, BASE, SIZES)
        table = tables + row.to(tl.int64) * table_stride
        attended = no_sums(SIZES.rows, VALUES)
        for position in tl.range(first, end, SIZES.tile, num_stages=SIZES.num_stages):
            attended = attend_tile(
                *(attended, q_parts, (keys, key_scales), (values, value_scales), table, kv_head),
                *(position, end, (high - window, high), (scale, soft_cap), SIZES, True),
            )
        if is_only != 0:
            store_answers(out, attended, sinks, start + query, heads, there, SIZES)
        else:
            _store_partials(partials, sums, attended, work, there, SIZES)


@triton.jit
def _joined(attended, partials, sums, places, there, HEAD: tl.constexpr):
    """What rows have attended to, and what was left at some places."""
    acc, rest, before, total = attended
    columns = tl.arange(0, HEAD.main)
    pointers = partials + places[:, None] * HEAD.width + columns[None, :]
    mask = there[:, None] & (columns < HEAD.width)[None, :]
    added = tl.load(pointers, mask=mask, other=0.0)
    its_largest = tl.load(sums + 2 * places, mask=there, other=0.0)
    its_total = tl.load(sums + 2 * places + 1, mask=there, other=1.0)
    largest = tl.maximum(before, its_largest)
    shrink, its_shrink = tl.exp2(before - largest), tl.exp2(its_largest - largest)
    acc = acc * shrink[:, None] + added * its_shrink[:, None]
    return acc, rest, largest, total * shrink + its_total * its_shrink


@triton.jit
def _reduce_kernel(
    out, partials, sums, items, ends, sinks, SIZES: tl.constexpr, USED: tl.constexpr
):
    VALUES: tl.constexpr = SIZES.values
    PAIRS: tl.constexpr = SIZES.num_kv_heads * SIZES.parts
    before, after = tl.load(ends + tl.program_id(0)), tl.load(ends + tl.program_id(0) + 1)
    if after - before > 1:
        kv_head, part = tl.program_id(1) // SIZES.parts, tl.program_id(1) % SIZES.parts
        start = tl.load(items + before * ITEM)
        queries = tl.load(items + before * ITEM + 1)
        query, heads, there = rows_of(0, queries, kv_head, part, USED, SIZES)
        attended = no_sums(USED, VALUES)
        for item in range(before, after):
            work = item * tl.full([1], PAIRS, dtype=tl.int64) + tl.program_id(1)
            places = work * SIZES.rows + tl.arange(0, USED)
            attended = _joined(attended, partials, sums, places, there, VALUES)
        store_answers(out, attended, sinks, start + query, heads, there, SIZES)


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
    layer = sizes(keys[0], values[0], q.shape[1], spans.window > 0, scoring.soft_cap > 0)
    known, tiling = _for_items(layer, chunks.max_queries, keys[0].itemsize)
    pairs = layer.num_kv_heads * known.parts
    most = most_chunks(spans.max_length, spans.window, chunks.base)
    split = len(chunks.items) * pairs * known.rows if most > 1 else 0
    partials = torch.empty((split, layer.values.width), dtype=torch.float32, device=q.device)
    sums = torch.empty((split, 2), dtype=torch.float32, device=q.device)
    programs = min(len(chunks.items) * pairs, _programs(tiling, q.device))
    _decode_kernel[(programs,)](
        *(out, partials, sums, q, as_stored(keys[0]), keys[1], as_stored(values[0]), values[1]),
        *(chunks.items, chunks.ends[-1:], spans.tables, scoring.sinks, *scoring.factors),
        *(spans.window, q.stride(0), spans.tables.stride(0)),
        SIZES=known,
        BASE=chunks.base,
        num_warps=tiling.num_warps,
    )
    if most > 1:
        used = known.heads * chunks.max_queries
        _reduce_kernel[(len(spans.rows), pairs)](
            *(out, partials, sums, chunks.items, chunks.ends, scoring.sinks),
            SIZES=_for_reduce(known),
            USED=used,
            num_warps=_reduce_warps(used, layer.values.width),
        )


def _for_items(layer: Sizes, max_queries: int, itemsize: int) -> tuple[Sizes, Tiling]:
    """Of items: as many heads and rows as registers hold sums of."""
    value_dim = layer.values.width
    heads = min(triton.next_power_of_2(layer.group), 32 if value_dim > 256 else 64)
    rows = max(16, heads * max_queries)
    tiling = tile_for(layer.keys.width, value_dim, itemsize, layer.is_shared)
    known = replace(layer, heads=heads, rows=rows, tile=tiling.tile, num_stages=tiling.num_stages)
    return known, tiling


def _for_reduce(known: Sizes) -> Sizes:
    """Partial sums are read as a whole."""
    width = known.values.width
    return replace(known, values=Head(width, width, triton.next_power_of_2(width), 0))


def _reduce_warps(rows: int, value_dim: int) -> int:
    return min(16, max(1, rows * triton.next_power_of_2(value_dim) // 512))


_programs = functools.cache(Tiling.programs)  # a device's properties take their time


def variants() -> tuple[Variant, ...]:
    """Of every family of shapes, with keys and values of 16 and of 8 bits."""
    forms = [_variant(shape, pool) for shape in SHAPES for pool in POOLS]
    return (*forms, *(_reduce_variant(shape) for shape in SHAPES))


def _variant(shape: Shape, pool: str) -> Variant:
    known, tiling = _for_items(shape.sizes, 1, 2 if pool == "bf16" else 1)
    integers = ("window", "q_stride", "table_stride")
    signature, absent = shape.arguments(pool)
    signature |= {
        **dict.fromkeys(("partials", "sums"), "*fp32"),
        **dict.fromkeys(("items", "count"), "*i32"),
        **dict.fromkeys(integers, "i32"),
    }
    constants = {**absent, "SIZES": known, "BASE": base_for(shape.group)}
    name = f"paged_decode-{pool}-{shape.name}"
    stages = tiling.num_stages
    return Variant(name, _decode_kernel, signature, constants, tiling.num_warps, stages, True)


def _reduce_variant(shape: Shape) -> Variant:
    known, _tiling = _for_items(shape.sizes, 1, 2)
    signature = {
        "out": "*bf16",
        **dict.fromkeys(("partials", "sums"), "*fp32"),
        **dict.fromkeys(("items", "ends"), "*i32"),
        **({"sinks": "*bf16"} if shape.has_sinks else {}),
    }
    constants = {"SIZES": _for_reduce(known), "USED": known.heads}
    constants |= {} if shape.has_sinks else {"sinks": None}
    warps = _reduce_warps(known.heads, shape.value_dim)
    name = f"paged_reduce-{shape.name}"
    return Variant(name, _reduce_kernel, signature, constants, warps, no_spills=True)
