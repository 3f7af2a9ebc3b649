"""What decode and prefill attention share: a tile of keys and values, and the sums over tiles.

Rows m of queries see the positions low[m] <= p < high[m]. With scores in powers of two,

    s = q k^T * scale * log2(e)     m = max s     total = sum 2^(s - m)     acc = sum 2^(s - m) v

A head is read in two parts, see `paged_shapes.Head`; S is always a `paged_shapes.Sizes`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.dot import add_dot

_LOG2_E = math.log2(math.e)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class KV(NamedTuple):
    """Keys and values in a kernel: [B, K, P, D] and [B, K, P, W], scales [B, K, P] or None."""

    key_data: tl.tensor
    key_scales: tl.tensor | None
    value_data: tl.tensor
    value_scales: tl.tensor | None


class Sums(NamedTuple):
    """What rows have attended to: acc [M, main] and [M, rest] of a head, largest and total [M]."""

    acc: tl.tensor
    rest: tl.tensor
    largest: tl.tensor
    total: tl.tensor


@triton.jit
def no_sums(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The sums of rows that have seen nothing."""
    MAIN: tl.constexpr = HEAD.main
    REST: tl.constexpr = HEAD.rest if HEAD.rest > 0 else 1
    acc, rest = tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    return Sums(acc, rest, tl.full([ROWS], -1.0e30, tl.float32), tl.zeros([ROWS], tl.float32))


@triton.jit
def rows_of(first, queries, kv_head, part, ROWS: tl.constexpr, S: tl.constexpr):
    """Query and head of every row, and which rows are there, from the query `first` on."""
    row = tl.arange(0, ROWS)
    query, head = first + row // S.heads, part * S.heads + row % S.heads
    return query, kv_head * S.group + head, (query < queries) & (head < S.group)


@triton.jit
def load_queries(q, tokens, stride, heads, there, S: tl.constexpr):
    """The queries of rows: both parts."""
    places = tokens.to(tl.int64) * stride + heads * S.keys.width
    main = _main(q, places, there, q.dtype.element_ty, S.keys, True)
    rest = main
    if S.keys.rest > 0:
        rest = _rest(q, places, there, q.dtype.element_ty, S.keys, True)
    return main, rest


@triton.jit
def _places(table, first, end, kv_head, S: tl.constexpr):
    """Of a tile of positions in the KV seen as [B * K * P, D]; `first` is a multiple of a tile."""
    offsets = tl.arange(0, S.tile)
    if S.block_size % S.tile == 0:
        block = tl.load(table + first // S.block_size).to(tl.int64)
        inside = first % S.block_size + offsets
    else:
        blocks = table + (first + offsets) // S.block_size
        block = tl.load(blocks, mask=first + offsets < end, other=0).to(tl.int64)
        inside = (first + offsets) % S.block_size
    return (block * S.num_kv_heads + kv_head) * S.block_size + inside


@triton.jit
def _load_part(
    data, places, there, FIRST: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr, MASKED
):
    """Columns FIRST .. FIRST + SIZE of heads that begin at some places."""
    columns = FIRST + tl.arange(0, SIZE)
    pointers = data + places[:, None] + columns[None, :]
    if HEAD.width < FIRST + SIZE:
        return tl.load(pointers, mask=there[:, None] & (columns < HEAD.width)[None, :], other=0)
    if MASKED:
        return tl.load(pointers, mask=there[:, None], other=0)
    return tl.load(pointers)


@triton.jit
def _main(data, places, there, element: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """The main part of heads that begin at some places, as `element`.

    Args:
        data: Queries, keys or values.
        places: [M] in numbers.
        there: [M] which of them are read; others are zeros if MASKED.
        element: The type to have them in.
        HEAD: A `Head`.
        MASKED: Some may not be there.
    """
    return as_element(_load_part(data, places, there, 0, HEAD.main, HEAD, MASKED), element)


@triton.jit
def _rest(data, places, there, element: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """The rest of them."""
    part = _load_part(data, places, there, HEAD.main, HEAD.rest, HEAD, MASKED)
    return as_element(part, element)


@triton.jit
def as_element(numbers, element: tl.constexpr):
    """Numbers of the KV in the type of the queries; bytes are those of float8_e4m3fn."""
    if numbers.dtype == tl.uint8:
        return _from_float8(numbers, element)
    if numbers.dtype == tl.int8:
        return numbers.to(tl.float32).to(element)
    return numbers.to(element)


@triton.jit
def _from_float8(numbers, element: tl.constexpr):
    """Sign and other bits moved to where wider types have them are a number 2^120 times too small.

    Four at a time: the bytes become the upper bytes of halves, the seven bits move down by four.
    """
    if _INTERPRETED or element != tl.bfloat16:
        bits = numbers.to(tl.int32)
        wide = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(element)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, sign, scale, zero;
        mov.b32 scale, 0x7b807b80;
        mov.b32 zero, 0x80008000;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        and.b32 sign, low, 0x80008000;
        shr.b32 low, low, 4;
        lop3.b32 low, low, 0x07f007f0, sign, 0xea;
        fma.rn.bf16x2 $0, low, scale, zero;
        and.b32 sign, high, 0x80008000;
        shr.b32 high, high, 4;
        lop3.b32 high, high, 0x07f007f0, sign, 0xea;
        fma.rn.bf16x2 $1, high, scale, zero;
        }""",
        "=r,=r,r",
        [numbers],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _scores(products, key_scales, places, there, factors, HAS_CAP: tl.constexpr):
    """Scores from products of queries and keys, and the factor that they lack."""
    if key_scales is not None:
        products = products * tl.load(key_scales + places, mask=there, other=0.0)[None, :]
    scale, soft_cap = factors
    if HAS_CAP:
        # `scale` is that of the hyperbolic tangent: 2 log2(e) / cap times that of the scores.
        return soft_cap * (1.0 - 2.0 / (tl.exp2(products * scale) + 1.0)), 1.0
    return products, scale


@triton.jit
def attend_tile(
    sums, q, kv, table, kv_head, first, end, bounds, factors, S: tl.constexpr, MASKED: tl.constexpr
):
    """`sums` and a tile of positions.

    Args:
        sums: `Sums` of the rows.
        q: Both parts of the queries.
        kv: `KV`.
        table: Blocks of the sequence.
        kv_head: Of the rows.
        first: Position where the tile begins.
        end: Positions from there on are not read.
        bounds: [M] the first position that a row sees, if there is a window, and [M] the one after
            the last.
        factors: See `Scoring.factors`.
        S: Of the layer and the program.
        MASKED: Rows may not see all of the tile.
    """
    TILE: tl.constexpr = S.tile
    element: tl.constexpr = q[0].dtype
    low, high = bounds
    places = _places(table, first, end, kv_head, S)
    positions = first + tl.arange(0, TILE)
    there = positions < end
    k_places, v_places = places * S.keys.stride, places * S.values.stride
    k = _main(kv.key_data, k_places, there, element, S.keys, MASKED)
    products = tl.zeros([q[0].shape[0], TILE], dtype=tl.float32)
    products = add_dot(products, q[0], tl.trans(k))
    k_rest = k
    if S.keys.rest > 0:
        k_rest = _rest(kv.key_data, k_places, there, element, S.keys, MASKED)
        products = add_dot(products, q[1], tl.trans(k_rest))
    scores, factor = _scores(products, kv.key_scales, places, there, factors, S.has_cap)
    if MASKED:
        seen = positions[None, :] < high[:, None]
        if S.has_window:
            seen &= positions[None, :] >= low[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    largest = tl.maximum(sums.largest, tl.max(scores, axis=1) * factor)
    # Said to be one rounding, so that it is one with masks and without.
    weights = tl.exp2(tl.fma(scores, factor, -largest[:, None]))
    shrink = tl.exp2(sums.largest - largest)
    total = sums.total * shrink + tl.sum(weights, axis=1)
    acc, rest = sums.acc * shrink[:, None], sums.rest
    if kv.value_scales is not None:
        weights *= tl.load(kv.value_scales + places, mask=there, other=0.0)[None, :]
    weights = weights.to(element)
    v, v_rest = k, k_rest
    if not S.is_read_once:
        v = _main(kv.value_data, v_places, there, element, S.values, MASKED)
    acc = add_dot(acc, weights, v)
    if S.values.rest > 0:
        if not S.is_read_once:
            v_rest = _rest(kv.value_data, v_places, there, element, S.values, MASKED)
        rest = add_dot(rest * shrink[:, None], weights, v_rest)
    return Sums(acc, rest, largest, total)


@triton.jit
def _with_sink(sums, sinks, heads, there):
    """A score of nothing beside the others."""
    sink = tl.load(sinks + heads, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
    largest = tl.maximum(sums.largest, sink)
    shrink = tl.exp2(sums.largest - largest)
    total = sums.total * shrink + tl.exp2(sink - largest)
    return Sums(sums.acc * shrink[:, None], sums.rest * shrink[:, None], largest, total)


@triton.jit
def _store_part(out, places, there, part, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH):
    """Put [M, SIZE] into columns FIRST .. of rows that have WIDTH of them."""
    columns = FIRST + tl.arange(0, SIZE)
    mask = there[:, None] & (columns < WIDTH)[None, :]
    pointers = out + places[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, part.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_head(out, places, there, main, rest, HEAD: tl.constexpr):
    """Put both parts of heads to some places of `out`, counted in heads."""
    _store_part(out, places, there, main, 0, HEAD.main, HEAD.width)
    if HEAD.rest > 0:
        _store_part(out, places, there, rest, HEAD.main, HEAD.rest, HEAD.width)


@triton.jit
def store_answers(out, sums, sinks, tokens, heads, there, S: tl.constexpr):
    """Put what rows have attended to, sinks included, into out [T, H, W]."""
    if sinks is not None:
        sums = _with_sink(sums, sinks, heads, there)
    total = tl.where(there, sums.total, 1.0)[:, None]
    places = tokens.to(tl.int64) * (S.num_kv_heads * S.group) + heads
    store_head(out, places, there, sums.acc / total, sums.rest / total, S.values)


class Scoring(NamedTuple):
    """How queries and keys make weights; see `paged_attention`."""

    scale: float
    soft_cap: float
    sinks: Tensor | None

    @property
    def factors(self) -> tuple[float, float]:
        """The scale and the cap of `_scores`."""
        if self.soft_cap:
            return 2 * _LOG2_E * self.scale / self.soft_cap, self.soft_cap * _LOG2_E
        return self.scale * _LOG2_E, 0.0


def as_stored(data: Tensor) -> Tensor:
    """The same for a kernel: float8 numbers as bytes, which every device can read."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data
