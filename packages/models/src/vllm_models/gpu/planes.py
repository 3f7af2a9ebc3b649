"""Pieces that kernels are made of: weights as numbers out of `Planes`, and sums of products.

A block of columns is loaded by `load_block`; the scales of each of its groups are made by
`group_scales`, and the RUN columns of each of its eight runs by `weight_run`. `add_products` does
all of it and adds to a tile of sums, [rows of the weight, rows of x]. Rows of both are given one
by one, so that a kernel may take experts and tokens in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_models.gpu.dot import add_dot


@triton.jit
def _units(plane, rows, is_row, num_blocks, block, RUN: tl.constexpr):
    """The integers of a block: [N, RUN] int32."""
    place = rows[:, None].to(tl.int64) * (num_blocks * RUN) + block * RUN
    units = tl.load(plane + place + tl.arange(0, RUN)[None, :], mask=is_row[:, None], other=0)
    return units.to(tl.int32)


@triton.jit
def load_block(
    low,
    high,
    factors,
    offset_factors,
    rows,
    is_row,
    num_rows,
    columns,
    block,
    LAYOUT: tl.constexpr,
):
    """Of a block: low and high units [N, RUN], factors of scales and offsets [N].

    What a layout does not have is a zero.

    Args:
        low: And the three after it: tensors of `Planes`.
        rows: [N] int32 or int64.
        is_row: [N] whether a row is there.
        num_rows: Rows of the whole weight.
        columns: K.
        block: Its number.
        LAYOUT: A `Layout`.
    """
    RUN: tl.constexpr = LAYOUT.run
    num_blocks = tl.cdiv(columns, 8 * RUN)
    units, high_units = tl.zeros((1, 1), tl.int32), tl.zeros((1, 1), tl.int32)
    factor, offset_factor = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    place = (block * (8 * RUN)) // 256 * num_rows + rows
    if LAYOUT.low_bits < 8:
        units = _units(low, rows, is_row, num_blocks, block, RUN)
    if LAYOUT.high_bits > 0:
        high_units = _units(high, rows, is_row, num_blocks, block, RUN)
    if LAYOUT.scale == "step":
        factor = tl.load(factors + place, mask=is_row, other=0.0).to(tl.float32)
    if LAYOUT.offset == "step":
        offset_factor = tl.load(offset_factors + place, mask=is_row, other=0.0).to(tl.float32)
    return units, high_units, factor, offset_factor


@triton.jit
def _group_values(values, rows, is_row, num_rows, columns, first, LAYOUT: tl.constexpr):
    """Of the groups of the columns from `first` on: [N, 1], or [N, RUN] if groups end in a run."""
    if LAYOUT.group % LAYOUT.run == 0:
        place = first // LAYOUT.group * num_rows + rows
        found = tl.load(values + place, mask=is_row & (first < columns), other=0)[:, None]
    else:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        place = column // LAYOUT.group * num_rows + rows[:, None]
        found = tl.load(values + place, mask=is_row[:, None] & (column < columns), other=0)
    return found


@triton.jit
def group_scales(
    scales,
    offsets,
    factor,
    offset_factor,
    rows,
    is_row,
    num_rows,
    columns,
    first,
    LAYOUT: tl.constexpr,
):
    """What the numbers of a run are multiplied with, and what is added: two of [N, 1 or RUN].

    Both are good for as many runs as the group has.

    Args:
        scales: And `offsets`: tensors of `Planes`.
        factor: And `offset_factor`: from `load_block`.
        rows: And the three after it: as there.
        first: Column where the run begins.
        LAYOUT: A `Layout`.
    """
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    scale = _group_values(scales, rows, is_row, num_rows, columns, first, LAYOUT)
    if LAYOUT.scale == "exponent":
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif LAYOUT.scale == "step":
        scale = scale.to(tl.float32) * factor[:, None]
    else:
        scale = scale.to(tl.float32)
    added = -scale * ((1 << BITS) + LAYOUT.center)
    if LAYOUT.offset != "none":
        offset = _group_values(offsets, rows, is_row, num_rows, columns, first, LAYOUT)
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
def _codes(
    units, high_units, low, rows, is_row, columns, first, J: tl.constexpr, LAYOUT: tl.constexpr
):
    """Codes of the run J of a block: [N, RUN] int32."""
    LOW: tl.constexpr = LAYOUT.low_bits
    HIGH: tl.constexpr = LAYOUT.high_bits
    if LOW == 8:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        there = is_row[:, None] & (column < columns)
        place = rows[:, None].to(tl.int64) * columns + column
        codes = tl.load(low + place, mask=there, other=0).to(tl.int32)
    else:
        codes = (units >> (J * LOW)) & ((1 << LOW) - 1)
        if HIGH > 0:
            codes |= ((high_units >> (J * HIGH)) & ((1 << HIGH) - 1)) << LOW
    return codes


@triton.jit
def weight_run(
    units,
    high_units,
    low,
    table,
    scale,
    added,
    rows,
    is_row,
    columns,
    first,
    J: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Weights of RUN columns: [N, RUN] float32; something finite outside of the weight.

    Args:
        units: And `high_units`: from `load_block`.
        low: And `table`: tensors of `Planes`.
        scale: And `added`: from `group_scales`.
        rows: And the two after it: as in `load_block`.
        first: Column where the run begins.
        J: Which run of its block it is.
        LAYOUT: A `Layout`.
    """
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    codes = _codes(units, high_units, low, rows, is_row, columns, first, J, LAYOUT)
    if LAYOUT.number == "table":
        weight = tl.load(table + codes).to(tl.float32) * scale
    elif LAYOUT.number == "e2m1":  # the bits of a half that is 2**14 too small
        halves = (((codes & 8) << 12) | ((codes & 7) << 9)).to(tl.uint16)
        weight = halves.to(tl.float16, bitcast=True).to(tl.float32) * scale
    elif LAYOUT.number == "e4m3":  # the bits of a half that is 2**8 too small
        halves = (((codes & 128) << 8) | ((codes & 127) << 7)).to(tl.uint16)
        weight = halves.to(tl.float16, bitcast=True).to(tl.float32) * scale
    else:
        # The fraction of a float that is 1 + code / 2**BITS: cheaper than to convert an integer.
        floats = ((codes << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)
        weight = floats * scale + added
    return weight


@triton.jit
def add_products(
    sums,
    x,
    x_rows,
    is_x_row,
    low,
    high,
    scales,
    offsets,
    factors,
    offset_factors,
    table,
    rows,
    is_row,
    num_rows,
    columns,
    first_block,
    last_block,
    LAYOUT: tl.constexpr,
):
    """sums [N, M] float32 + weight[rows] x[x_rows]^T over the blocks first_block .. last_block - 1.

    Args:
        sums: [N, M]; M and N at least 16.
        x: [rows of x, K], contiguous.
        x_rows: [M] int32 or int64.
        is_x_row: [M] whether a row is there.
        low: And the six after it: `Planes.tensors`.
        rows: [N] rows of the weight.
        is_row: [N] whether a row is there.
        num_rows: Rows of the whole weight.
        columns: K.
        first_block: Of columns.
        last_block: One past the last.
        LAYOUT: A `Layout`.
    """
    RUN: tl.constexpr = LAYOUT.run
    x_place = x_rows[None, :].to(tl.int64) * columns
    for block in range(first_block, last_block):
        units, high_units, factor, offset_factor = load_block(
            *(low, high, factors, offset_factors, rows, is_row, num_rows, columns, block), LAYOUT
        )
        for j in tl.static_range(8):
            first = block * (8 * RUN) + j * RUN
            if j % LAYOUT.runs_per_group == 0:
                scale, added = group_scales(
                    *(scales, offsets, factor, offset_factor),
                    *(rows, is_row, num_rows, columns, first),
                    LAYOUT,
                )
            weight = weight_run(
                *(units, high_units, low, table, scale, added, rows, is_row, columns, first),
                j,
                LAYOUT,
            )
            column = first + tl.arange(0, RUN)[:, None]
            there = is_x_row[None, :] & (column < columns)
            some = tl.load(x + x_place + column, mask=there, other=0.0)  # [RUN, M]
            sums = add_dot(sums, weight.to(some.dtype), some)
    return sums
