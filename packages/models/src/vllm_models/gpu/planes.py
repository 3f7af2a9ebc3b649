"""Pieces that kernels are made of: weights as numbers out of `Planes`, and sums of products.

In a kernel a weight is three tuples: of codes (low, high, table), of what scales and shifts them
(scales, offsets, factors, offset_factors), both of `Planes.tensors`, and of the rows and columns
of the whole weight. What its LAYOUT does not have is not looked at. A block of columns is loaded
by `load_block`; `weight_run` makes numbers of each of its eight runs. `row_products` multiplies
them with a row of x, `add_products` adds to a tile of sums [rows of the weight, rows of x]. Rows of
both are given one by one, so that a kernel may take experts and tokens in any order.
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
def load_block(weight, rows, is_row, block, LAYOUT: tl.constexpr):
    """Of a block: low and high units [N, RUN], and factors of scales and offsets [N].

    What a layout does not have is a zero.

    Args:
        weight: See above.
        rows: [N] int32 or int64.
        is_row: [N] whether a row is there.
        block: Its number.
        LAYOUT: A `Layout`.
    """
    RUN: tl.constexpr = LAYOUT.run
    codes, steps, size = weight
    num_blocks = tl.cdiv(size[1], 8 * RUN)
    units, high_units = tl.zeros((1, 1), tl.int32), tl.zeros((1, 1), tl.int32)
    factor, offset_factor = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    place = (block * (8 * RUN)) // 256 * size[0] + rows
    if LAYOUT.low_bits < 8:
        units = _units(codes[0], rows, is_row, num_blocks, block, RUN)
    if LAYOUT.high_bits > 0:
        high_units = _units(codes[1], rows, is_row, num_blocks, block, RUN)
    if LAYOUT.scale == "step":
        factor = tl.load(steps[2] + place, mask=is_row, other=0.0).to(tl.float32)
    if LAYOUT.offset == "step":
        offset_factor = tl.load(steps[3] + place, mask=is_row, other=0.0).to(tl.float32)
    return (units, high_units), (factor, offset_factor)


@triton.jit
def _group_values(values, size, rows, is_row, first, LAYOUT: tl.constexpr):
    """Of the groups of the columns from `first` on: [N, 1], or [N, RUN] if groups end in a run."""
    num_rows, columns = size
    if LAYOUT.group % LAYOUT.run == 0:
        place = first // LAYOUT.group * num_rows + rows
        found = tl.load(values + place, mask=is_row & (first < columns), other=0)[:, None]
    else:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        place = column // LAYOUT.group * num_rows + rows[:, None]
        found = tl.load(values + place, mask=is_row[:, None] & (column < columns), other=0)
    return found


@triton.jit
def _offsets(added, offsets, size, scale, factor, rows, is_row, first, LAYOUT: tl.constexpr):
    """What is added to the numbers of a run, with the offsets of its groups."""
    offset = _group_values(offsets, size, rows, is_row, first, LAYOUT)
    offset = offset.to(tl.float32)
    if LAYOUT.offset == "zero":
        added -= offset * scale
    elif LAYOUT.offset == "step":
        added -= offset * factor[:, None]
    else:
        added += offset
    return added


@triton.jit
def _group_scales(weight, factors, rows, is_row, first, LAYOUT: tl.constexpr):
    """What the numbers of a run are multiplied with, and what is added: two of [N, 1 or RUN]."""
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    _codes, steps, size = weight
    scale = _group_values(steps[0], size, rows, is_row, first, LAYOUT)
    if LAYOUT.scale == "exponent":
        scale = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif LAYOUT.scale == "step":
        scale = scale.to(tl.float32) * factors[0][:, None]
    else:
        scale = scale.to(tl.float32)
    added = -scale * ((1 << BITS) + LAYOUT.center)
    if LAYOUT.offset != "none":
        added = _offsets(added, steps[1], size, scale, factors[1], rows, is_row, first, LAYOUT)
    if LAYOUT.number == "integer":
        scale *= 1 << BITS
    elif LAYOUT.number == "e2m1":
        scale *= 16384.0
    elif LAYOUT.number == "e4m3":
        scale *= 256.0
    return scale, added


@triton.jit
def _codes_of(low, units, columns, rows, is_row, first, J: tl.constexpr, LAYOUT: tl.constexpr):
    """Codes of the run J of a block: [N, RUN] int32."""
    LOW: tl.constexpr = LAYOUT.low_bits
    HIGH: tl.constexpr = LAYOUT.high_bits
    if LOW == 8:
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        there = is_row[:, None] & (column < columns)
        place = rows[:, None].to(tl.int64) * columns + column
        codes = tl.load(low + place, mask=there, other=0).to(tl.int32)
    else:
        codes = (units[0] >> (J * LOW)) & ((1 << LOW) - 1)
        if HIGH > 0:
            codes |= ((units[1] >> (J * HIGH)) & ((1 << HIGH) - 1)) << LOW
    return codes


@triton.jit
def _numbers(codes, table, scale, added, LAYOUT: tl.constexpr):
    """What codes [N, RUN] stand for: float32."""
    BITS: tl.constexpr = LAYOUT.low_bits + LAYOUT.high_bits
    if LAYOUT.number == "table":
        numbers = tl.load(table + codes).to(tl.float32) * scale
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
def weight_run(
    weight, block, units, factors, scales, rows, is_row, J: tl.constexpr, LAYOUT: tl.constexpr
):
    """RUN columns: the first of them, their weights [N, RUN] float32, and scales for the next run.

    Weights are something finite outside of the whole weight.

    Args:
        weight: See above.
        block: Its number.
        units: And `factors`: from `load_block`.
        scales: From the run before; anything for the first of a block.
        rows: And `is_row`: as in `load_block`.
        J: Which run of its block it is.
        LAYOUT: A `Layout`.
    """
    codes, _steps, size = weight
    first = block * (8 * LAYOUT.run) + J * LAYOUT.run
    if J % LAYOUT.runs_per_group == 0:
        scales = _group_scales(weight, factors, rows, is_row, first, LAYOUT)
    own = _codes_of(codes[0], units, size[1], rows, is_row, first, J, LAYOUT)
    return first, _numbers(own, codes[2], scales[0], scales[1], LAYOUT), scales


@triton.jit
def row_products(x, weight, rows, is_row, first_block, last_block, LAYOUT: tl.constexpr):
    """[N] float32: products with the only row of x; see `add_products`."""
    RUN: tl.constexpr = LAYOUT.run
    columns = weight[2][1]
    sums = tl.zeros((rows.shape[0], RUN), tl.float32)
    for block in range(first_block, last_block):
        units, factors = load_block(weight, rows, is_row, block, LAYOUT)
        scales = factors
        for j in tl.static_range(8):
            first, numbers, scales = weight_run(
                weight, block, units, factors, scales, rows, is_row, j, LAYOUT
            )
            column = first + tl.arange(0, RUN)
            some = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
            sums += numbers * some[None, :]
    return tl.sum(sums, 1)


@triton.jit
def add_products(
    sums,
    x,
    x_rows,
    is_x_row,
    weight,
    rows,
    is_row,
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
        weight: See above.
        rows: [N] rows of the weight.
        is_row: [N] whether a row is there.
        first_block: Of columns.
        last_block: One past the last.
        LAYOUT: A `Layout`.
    """
    columns = weight[2][1]
    x_place = x_rows[None, :].to(tl.int64) * columns
    for block in range(first_block, last_block):
        units, factors = load_block(weight, rows, is_row, block, LAYOUT)
        scales = factors
        for j in tl.static_range(8):
            first, numbers, scales = weight_run(
                weight, block, units, factors, scales, rows, is_row, j, LAYOUT
            )
            column = first + tl.arange(0, LAYOUT.run)[:, None]
            there = is_x_row[None, :] & (column < columns)
            some = tl.load(x + x_place + column, mask=there, other=0.0)  # [RUN, M]
            sums = add_dot(sums, numbers.to(some.dtype), some)
    return sums
