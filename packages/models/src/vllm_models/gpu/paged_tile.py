"""What decode and prefill attention share: a tile of keys and values, and the sums over tiles.

Rows m of queries see the positions low[m] <= p < high[m]. With scores in powers of two,

    s = q k^T * scale * log2(e)     m = max s     total = sum 2^(s - m)     acc = sum 2^(s - m) v

A head is read in two parts, the largest power of two and what is left: 576 = 512 + 64.
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


@triton.jit
def tile_rows(
    table,
    first,
    end,
    head,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Places of TILE positions in the KV seen as [B * K * P, D]; `first` is a multiple of TILE."""
    offsets = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        inside = first % BLOCK_SIZE + offsets
    else:
        blocks = table + (first + offsets) // BLOCK_SIZE
        block = tl.load(blocks, mask=first + offsets < end, other=0).to(tl.int64)
        inside = (first + offsets) % BLOCK_SIZE
    return (block * NUM_KV_HEADS + head) * BLOCK_SIZE + inside


@triton.jit
def load_part(
    data,
    rows,
    there,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Columns FIRST .. FIRST + SIZE of some rows, of which a head has WIDTH."""
    columns = FIRST + tl.arange(0, SIZE)
    pointers = data + rows[:, None] * STRIDE + columns[None, :]
    if FIRST + SIZE > WIDTH:
        return tl.load(pointers, mask=there[:, None] & (columns < WIDTH)[None, :], other=0)
    if MASKED:
        return tl.load(pointers, mask=there[:, None], other=0)
    return tl.load(pointers)


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
def _scores(products, key_scales, rows, there, scale, soft_cap, HAS_CAP: tl.constexpr):
    """Scores from products of queries and keys, and the factor that they lack."""
    if key_scales is not None:
        products = products * tl.load(key_scales + rows, mask=there, other=0.0)[None, :]
    if HAS_CAP:
        # `scale` is that of the hyperbolic tangent: 2 log2(e) / cap times that of the scores.
        return soft_cap * (1.0 - 2.0 / (tl.exp2(products * scale) + 1.0)), 1.0
    return products, scale


@triton.jit
def attend_tile(
    acc,
    acc_rest,
    largest,
    total,
    q,
    q_rest,
    keys,
    key_scales,
    values,
    value_scales,
    table,
    first,
    end,
    low,
    high,
    head,
    scale,
    soft_cap,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_SHARED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_REST: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the positions first .. first + TILE, which are read up to `end`."""
    element: tl.constexpr = q.dtype
    rows = tile_rows(table, first, end, head, NUM_KV_HEADS, BLOCK_SIZE, TILE)
    positions = first + tl.arange(0, TILE)
    there = positions < end
    k = as_element(load_part(keys, rows, there, DIM, 0, MAIN, DIM, MASKED), element)
    products = tl.zeros([q.shape[0], TILE], dtype=tl.float32)
    products = add_dot(products, q, tl.trans(k))
    if REST > 0:
        k_rest = as_element(load_part(keys, rows, there, DIM, MAIN, REST, DIM, MASKED), element)
        products = add_dot(products, q_rest, tl.trans(k_rest))
    scores, factor = _scores(products, key_scales, rows, there, scale, soft_cap, HAS_CAP)
    if MASKED:
        seen = positions[None, :] < high[:, None]
        if HAS_WINDOW:
            seen &= positions[None, :] >= low[:, None]
        scores = tl.where(seen, scores, float("-inf"))
    above = tl.maximum(largest, tl.max(scores, axis=1) * factor)
    # Said to be one rounding, so that it is one with masks and without.
    weights = tl.exp2(tl.fma(scores, factor, -above[:, None]))
    shrink = tl.exp2(largest - above)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    if value_scales is not None:
        weights = weights * tl.load(value_scales + rows, mask=there, other=0.0)[None, :]
    weights = weights.to(element)
    if IS_SHARED and VALUE_MAIN == MAIN:
        v = k
    else:
        v = load_part(values, rows, there, VALUE_STRIDE, 0, VALUE_MAIN, VALUE_DIM, MASKED)
        v = as_element(v, element)
    acc = add_dot(acc, weights, v)
    if VALUE_REST > 0:
        if IS_SHARED and VALUE_DIM == DIM:
            v_rest = k_rest
        else:
            v_rest = load_part(
                values, rows, there, VALUE_STRIDE, VALUE_MAIN, VALUE_REST, VALUE_DIM, MASKED
            )
            v_rest = as_element(v_rest, element)
        acc_rest = add_dot(acc_rest * shrink[:, None], weights, v_rest)
    return acc, acc_rest, above, total


@triton.jit
def with_sink(acc, acc_rest, largest, total, sinks, heads, there):
    """A score of nothing beside the others."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
        above = tl.maximum(largest, sink)
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.exp2(sink - above)
        acc, acc_rest = acc * shrink[:, None], acc_rest * shrink[:, None]
    return acc, acc_rest, total


@triton.jit
def store_part(
    out, places, there, part, STRIDE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    """Put [M, ...] into columns FIRST .. of rows that have STRIDE of them."""
    columns = FIRST + tl.arange(0, SIZE)
    mask = there[:, None] & (columns < STRIDE)[None, :]
    tl.store(out + places[:, None] * STRIDE + columns[None, :], part, mask=mask)


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
