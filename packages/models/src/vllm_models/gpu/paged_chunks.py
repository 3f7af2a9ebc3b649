"""The chunks of context that decode attention computes apart, listed on the device.

A context is cut at fixed positions, so that what a sequence gets depends on no other sequence:

    16 chunks of BASE positions, 28 of 4 * BASE, then chunks of 16 * BASE

Longer chunks behind bound the partial sums of long contexts. An item has 8 numbers: first query,
queries, row of the tables, context length, chunk, and whether it is the only one (two are free).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.spans import Chunks, GpuSpans

_SHORT, _MIDDLE = 16, 28  # chunks of the first two lengths
ITEM = tl.constexpr(8)  # numbers
_TILE = 64
_LOOK = 256  # sequences looked at together


@triton.jit
def chunk_start(chunk, BASE: tl.constexpr):
    """First position of a chunk."""
    middle = 16 * BASE + (chunk - 16) * (4 * BASE)
    far = 128 * BASE + (chunk - 44) * (16 * BASE)
    return tl.where(chunk < 16, chunk * BASE, tl.where(chunk < 44, middle, far))


@triton.jit
def _chunk_at(position, BASE: tl.constexpr):
    """The chunk of a position."""
    middle = 16 + (position - 16 * BASE) // (4 * BASE)
    far = 44 + (position - 128 * BASE) // (16 * BASE)
    near = tl.where(position < 128 * BASE, middle, far)
    return tl.where(position < 16 * BASE, position // BASE, near)


@triton.jit
def _first_and_last(
    starts, lengths, index, there, window, MAX_QUERIES: tl.constexpr, BASE: tl.constexpr
):
    """First and last chunk of some sequences; those with too many queries have none."""
    queries = tl.load(starts + index + 1, mask=there, other=0)
    queries -= tl.load(starts + index, mask=there, other=0)
    length = tl.load(lengths + index, mask=there, other=0)
    seen = tl.where(window > 0, tl.maximum(length - queries + 1 - window, 0), 0)
    first, last = _chunk_at(seen, BASE), _chunk_at(length - 1, BASE)
    has_some = there & (queries <= MAX_QUERIES) & (queries > 0) & (length > 0)
    return first, tl.where(has_some, last, first - 1)


@triton.jit(do_not_specialize=["num_sequences", "window"])
def _plan_kernel(
    items,
    ends,
    rows,
    starts,
    lengths,
    num_sequences,
    window,
    MAX_QUERIES: tl.constexpr,
    BASE: tl.constexpr,
    LOOK: tl.constexpr,
    TILE: tl.constexpr,
):
    sequence = tl.program_id(0)
    before = 0
    for base in range(0, sequence, LOOK):
        index = base + tl.arange(0, LOOK)
        first, last = _first_and_last(
            starts, lengths, index, index < sequence, window, MAX_QUERIES, BASE
        )
        before += tl.sum(last - first + 1)
    first, last = _first_and_last(starts, lengths, sequence, True, window, MAX_QUERIES, BASE)
    tl.store(ends + sequence, before)
    if sequence == num_sequences - 1:
        tl.store(ends + num_sequences, before + last - first + 1)
    start, row = tl.load(starts + sequence), tl.load(rows + sequence)
    queries = tl.load(starts + sequence + 1) - start
    length = tl.load(lengths + sequence)
    for base in range(first, last + 1, TILE):
        chunk = base + tl.arange(0, TILE)
        there = chunk <= last
        item = items + (before + last - chunk) * ITEM  # the longest chunks first
        tl.store(item, start, mask=there)
        tl.store(item + 1, queries, mask=there)
        tl.store(item + 2, row, mask=there)
        tl.store(item + 3, length, mask=there)
        tl.store(item + 4, chunk, mask=there)
        tl.store(item + 5, (first == last).to(tl.int32), mask=there)


def plan(spans: GpuSpans, num_heads: int, num_kv_heads: int) -> Chunks:
    """List the chunks of a step; the same for all layers of a window and these numbers of heads."""
    num_sequences, device = len(spans.rows), spans.rows.device
    group = num_heads // num_kv_heads
    base, max_queries = base_for(group), queries_for(spans.max_queries, group)
    most = num_sequences * most_chunks(spans.max_length, spans.window, base)
    items = torch.empty((most, ITEM.value), dtype=torch.int32, device=device)
    ends = torch.empty((num_sequences + 1,), dtype=torch.int32, device=device)
    _plan_kernel[(num_sequences,)](
        *(items, ends, spans.rows, spans.starts, spans.lengths, num_sequences, spans.window),
        MAX_QUERIES=max_queries,
        BASE=base,
        LOOK=_LOOK,
        TILE=_TILE,
    )
    return Chunks(items, ends, base, max_queries)


def base_for(group: int) -> int:
    """Positions of the first chunks: partial sums of many heads have to be worth it."""
    return 256 if group <= 16 else 1024


def queries_for(max_queries: int, group: int) -> int:
    """Sequences with up to so many queries are computed by chunks: drafts if none has more."""
    fits = max_queries <= 8 and triton.next_power_of_2(max_queries * group) <= 64
    return triton.next_power_of_2(max_queries) if fits else 1


def most_chunks(max_length: int, window: int, base: int) -> int:
    """No sequence has more."""
    short, middle = _SHORT * base, _MIDDLE * 4 * base
    beyond = max(0, max_length - short - middle)
    most = triton.cdiv(min(max_length, short), base) + triton.cdiv(beyond, 16 * base)
    most += triton.cdiv(min(max(0, max_length - short), middle), 4 * base)
    return min(most, window // base + 3) if window else most


def variants() -> tuple[Variant, ...]:
    """For the sizes of any model."""
    pointers = dict.fromkeys(("items", "ends", "rows", "starts", "lengths"), "*i32")
    numbers = dict.fromkeys(("num_sequences", "window"), "i32")
    constants = {"MAX_QUERIES": 1, "BASE": 256, "LOOK": _LOOK, "TILE": _TILE}
    return (Variant("plan_chunks", _plan_kernel, {**pointers, **numbers}, constants),)
