"""Tiles of heads in a kernel: queries, keys and values, in the type in which they are multiplied.

A head is read in two parts; HEAD is always a `paged_shapes.Head`. Kernels give a member of SIZES a
name of its own before they look into it: Triton 3.6 does not know SIZES.keys.width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.dot import INTERPRETED


@triton.jit
def tile_places(table, first, end, kv_head, SIZES: tl.constexpr):
    """Of a tile of positions in the KV seen as [B * K * P, D]; `first` is a multiple of a tile."""
    BLOCK_SIZE: tl.constexpr = SIZES.block_size
    offsets = tl.arange(0, SIZES.tile)
    if BLOCK_SIZE % SIZES.tile == 0:
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        inside = first % BLOCK_SIZE + offsets
    else:
        blocks = table + (first + offsets) // BLOCK_SIZE
        block = tl.load(blocks, mask=first + offsets < end, other=0).to(tl.int64)
        inside = (first + offsets) % BLOCK_SIZE
    return (block * SIZES.num_kv_heads + kv_head) * BLOCK_SIZE + inside


@triton.jit
def load_part(
    data,
    places,
    there,
    element: tl.constexpr,
    IS_REST: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A part of some heads, as `element`.

    Args:
        data: Queries, keys or values.
        places: [M] where the heads begin, in STRIDE numbers.
        there: [M] which of them are read; others are zeros if MASKED.
        element: The type to have them in.
        IS_REST: It is the second part.
        STRIDE: Numbers between places.
        HEAD: A `Head`.
        MASKED: Some may not be there.
    """
    FIRST: tl.constexpr = HEAD.main if IS_REST else 0
    SIZE: tl.constexpr = HEAD.rest if IS_REST else HEAD.main
    columns = FIRST + tl.arange(0, SIZE)
    pointers = data + places[:, None] * STRIDE + columns[None, :]
    if HEAD.width < FIRST + SIZE:
        mask = there[:, None] & (columns < HEAD.width)[None, :]
        numbers = tl.load(pointers, mask=mask, other=0)
    elif MASKED:
        numbers = tl.load(pointers, mask=there[:, None], other=0)
    else:
        numbers = tl.load(pointers)
    return _as_element(numbers, element)


@triton.jit
def _as_element(numbers, element: tl.constexpr):
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
    if INTERPRETED or element != tl.bfloat16:
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
def _store_part(
    out, places, there, part, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """Put [M, SIZE] into columns FIRST .. of heads, of which each has WIDTH."""
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


def as_stored(data: Tensor) -> Tensor:
    """The same for a kernel: float8 numbers as bytes, which every device can read."""
    return data.view(torch.uint8) if data.dtype == torch.float8_e4m3fn else data
