"""Pieces that kernels are made of: weights as numbers out of `Planes`, and sums of products.

A block of columns is loaded by `load_block`; the scales of each of its groups are made by
`group_scales`, and the RUN columns of each of its eight runs by `weight_run`. `row_products` does
all of it for a row of x, `add_products` for a tile of sums, [rows of the weight, rows of x]. Rows
of both are given one by one, so that a kernel may take experts and tokens in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vllm_models.gpu.dot import add_dot


class Weight(NamedTuple):
    """A weight in a kernel: `Planes.tensors`, the rows of the whole weight, and K."""

    low: tl.tensor
    high: tl.tensor | None
    scales: tl.tensor
    offsets: tl.tensor | None
    factors: tl.tensor | None
    offset_factors: tl.tensor | None
    table: tl.tensor | None
    num_rows: tl.tensor
    columns: tl.tensor


@triton.jit
def _units(plane, rows, is_row, num_blocks, block, RUN: tl.constexpr):
    """The integers of a block: [N, RUN] int32."""
    place = rows[:, None].to(tl.int64) * (num_blocks * RUN) + block * RUN
    units = tl.load(plane + place + tl.arange(0, RUN)[None, :], mask=is_row[:, None], other=0)
    return units.to(tl.int32)


@triton.jit
def load_block(weight, rows, is_row, block, LAYOUT: tl.constexpr):
    """Of a block: low and high units [N, RUN], factors of scales and offsets [N].

    What a layout does not have is a zero.

    Args:
        weight: A `Weight`.
        rows: [N] int32 or int64.
        is_row: [N] whether a row is there.
        block: Its number.
        LAYOUT: A `Layout`.
    """
    RUN: tl.constexpr = LAYOUT.run
    num_blocks = tl.cdiv(weight.columns, 8 * RUN)
    units, high_units = tl.zeros((1, 1), tl.int32), tl.zeros((1, 1), tl.int32)
    factor, offset_factor = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    place = (block * (8 * RUN)) // 256 * weight.num_rows + rows
    if LAYOUT.low_bits < 8:
        units = _units(weight.low, rows, is_row, num_blocks, block, RUN)
    if LAYOUT.high_bits > 0:
        high_units = _units(weight.high, rows, is_row, num_blocks, block, RUN)
    if LAYOUT.scale == "step":
        factor = tl.load(weight.factors + place, mask=is_row, other=0.0).to(tl.float32)
    if LAYOUT.offset == "step":
        offset_factor = tl.load(weight.offset_factors + place, mask=is_row, other=0.0)
        offset_factor = offset_factor.to(tl.float32)
    return units, high_units, factor, offset_factor


@triton.jit
def _group_values(numbers, weight, rows, is_row, first, LAYOUT: tl.constexpr):
    """Of the groups of the columns from `first` on: [N, 1], or [N, RUN] if groups end in a run."""
    if LAYOUT.group % LAYOUT.run == 0:
        place = first // LAYOUT.group * weight.num_rows + rows
        found = tl.load(numbers + place, mask=is_row & (first < weight.columns), other=0)[:, None]
    else:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        place = column // LAYOUT.group * weight.num_rows + rows[:, None]
        found = tl.load(numbers + place, mask=is_row[:, None] & (column < weight.columns), other=0)
    return found


@triton.jit
def group_scales(weight, loaded, rows, is_row, first, LAYOUT: tl.constexpr):
    """What the numbers of a run are multiplied with, and what is added: two of [N, 1 or RUN].

    Both are good for as many runs as the group has.

    Args:
        weight: A `Weight`.
        loaded: From `load_block`.
        rows: And `is_row`: as there.
        first: Column where the run begins.
        LAYOUT: A `Layout`.
    """
    _units, _high_units, factor, offset_factor = loaded
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    scale = _group_values(weight.scales, weight, rows, is_row, first, LAYOUT)
    if LAYOUT.scale == "exponent":
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif LAYOUT.scale == "step":
        scale = scale.to(tl.float32) * factor[:, None]
    else:
        scale = scale.to(tl.float32)
    added = -scale * ((1 << BITS) + LAYOUT.center)
    if LAYOUT.offset != "none":
        offset = _group_values(weight.offsets, weight, rows, is_row, first, LAYOUT)
        offset = offset.to(tl.float32)
        if LAYOUT.offset == "zero":
            added -= offset * scale
        elif LAYOUT.offset == "step":
            added -= offset * offset_factor[:, None]
        else:
            added += offset
    if LAYOUT.number == "integer":
        scale *= 1 << BITS
    elif LAYOUT.number == "e2m1":
        scale *= 16384.0
    elif LAYOUT.number == "e4m3":
        scale *= 256.0
    return scale, added


@triton.jit
def _codes(weight, loaded, rows, is_row, first, J: tl.constexpr, LAYOUT: tl.constexpr):
    """Codes of the run J of a block: [N, RUN] int32."""
    LOW: tl.constexpr = LAYOUT.low_bits
    HIGH: tl.constexpr = LAYOUT.high_bits
    if LOW == 8:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        there = is_row[:, None] & (column < weight.columns)
        place = rows[:, None].to(tl.int64) * weight.columns + column
        codes = tl.load(weight.low + place, mask=there, other=0).to(tl.int32)
    else:
        codes = (loaded[0] >> (J * LOW)) & ((1 << LOW) - 1)
        if HIGH > 0:
            codes |= ((loaded[1] >> (J * HIGH)) & ((1 << HIGH) - 1)) << LOW
    return codes


@triton.jit
def weight_run(weight, loaded, scaling, rows, is_row, first, J: tl.constexpr, LAYOUT: tl.constexpr):
    """Numbers of RUN columns: [N, RUN] float32; something finite outside of the weight.

    Args:
        weight: A `Weight`.
        loaded: From `load_block`.
        scaling: From `group_scales`.
        rows: And `is_row`: as in `load_block`.
        first: Column where the run begins.
        J: Which run of its block it is.
        LAYOUT: A `Layout`.
    """
    scale, added = scaling
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    codes = _codes(weight, loaded, rows, is_row, first, J, LAYOUT)
    if LAYOUT.number == "table":
        numbers = tl.load(weight.table + codes).to(tl.float32) * scale
    elif LAYOUT.number == "e2m1":  # the bits of a half that is 2**14 too small
        halves = (((codes & 8) << 12) | ((codes & 7) << 9)).to(tl.uint16)
        numbers = halves.to(tl.float16, bitcast=True).to(tl.float32) * scale
    elif LAYOUT.number == "e4m3":  # the bits of a half that is 2**8 too small
        halves = (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.uint16)
        numbers = halves.to(tl.float16, bitcast=True).to(tl.float32) * scale
    else:
        # The fraction of a float that is 1 + code / 2**BITS: cheaper than to convert an integer.
        floats = ((codes << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
        numbers = floats * scale + added
    return numbers


@triton.jit
def row_products(x, weight, rows, is_row, first_block, last_block, LAYOUT: tl.constexpr):
    """[N] float32: products with a row of x; arguments are those of `add_products`."""
    RUN: tl.constexpr = LAYOUT.run
    sums = tl.zeros((rows.shape[0], RUN), tl.float32)
    for block in range(first_block, last_block):
        loaded = load_block(weight, rows, is_row, block, LAYOUT)
        for j in tl.static_range(8):
            first = block * (8 * RUN) + j * RUN
            if j % LAYOUT.runs_per_group == 0:
                scaling = group_scales(weight, loaded, rows, is_row, first, LAYOUT)
            numbers = weight_run(weight, loaded, scaling, rows, is_row, first, j, LAYOUT)
            column = first + tl.arange(0, RUN)
            some = tl.load(x + column, mask=column < weight.columns, other=0.0).to(tl.float32)
            sums += numbers * some[None, :]
    return tl.sum(sums, 1)


@triton.jit
def add_products(
    sums, x, x_rows, is_x_row, weight, rows, is_row, first_block, last_block, LAYOUT: tl.constexpr
):
    """sums [N, M] float32 + weight[rows] x[x_rows]^T over the blocks first_block .. last_block - 1.

    Args:
        sums: [N, M]; M and N at least 16.
        x: [rows of x, K], contiguous.
        x_rows: [M] int32 or int64.
        is_x_row: [M] whether a row is there.
        weight: A `Weight`.
        rows: [N] rows of the weight.
        is_row: [N] whether a row is there.
        first_block: Of columns.
        last_block: One past the last.
        LAYOUT: A `Layout`.
    """
    RUN: tl.constexpr = LAYOUT.run
    x_place = x_rows[None, :].to(tl.int64) * weight.columns
    for block in range(first_block, last_block):
        loaded = load_block(weight, rows, is_row, block, LAYOUT)
        for j in tl.static_range(8):
            first = block * (8 * RUN) + j * RUN
            if j % LAYOUT.runs_per_group == 0:
                scaling = group_scales(weight, loaded, rows, is_row, first, LAYOUT)
            numbers = weight_run(weight, loaded, scaling, rows, is_row, first, j, LAYOUT)
            column = first + tl.arange(0, RUN)[:, None]
            there = is_x_row[None, :] & (column < weight.columns)
            some = tl.load(x + x_place + column, mask=there, other=0.0)  # [RUN, M]
            sums = add_dot(sums, numbers.to(some.dtype), some)
    return sums
