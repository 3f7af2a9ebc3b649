"""Pieces of kernels that multiply plain weights, and where tiles of sums [N, M] go.

N are rows of the weight [rows, K], M rows of x [rows, K], which are contiguous and given one by
one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_models.gpu.dot import add_dot


@triton.jit
def tile_pointers(x, x_rows, weight, rows, columns, BLOCK_K: tl.constexpr):
    """Where the first BLOCK_K columns of x [BLOCK_K, M] and of a weight [N, BLOCK_K] are."""
    column = tl.arange(0, BLOCK_K)
    x_place = x + x_rows[None, :].to(tl.int64) * columns + column[:, None]
    return x_place, weight + rows[:, None].to(tl.int64) * columns + column[None, :]


@triton.jit
def load_tiles(pointers, first, columns, is_x_row, is_row, BLOCK_K: tl.constexpr):
    """The columns from `first` on of x [BLOCK_K, M] and of a weight [N, BLOCK_K]; zeros past K."""
    x_place, weight_place = pointers
    there = first + tl.arange(0, BLOCK_K) < columns
    some = tl.load(weight_place + first, mask=is_row[:, None] & there[None, :], other=0.0)
    x_some = tl.load(x_place + first, mask=is_x_row[None, :] & there[:, None], other=0.0)
    return x_some, some


@triton.jit
def dense_products(
    sums,
    x,
    x_rows,
    is_x_row,
    weight,
    rows,
    is_row,
    columns,
    first_block,
    last_block,
    BLOCK_K: tl.constexpr,
):
    """sums [N, M] float32 + weight[rows] x[x_rows]^T over the blocks first_block .. last_block - 1.

    Args:
        sums: [N, M]; M and N at least 16.
        x: [rows of x, K].
        x_rows: [M] int32 or int64.
        is_x_row: [M] whether a row is there.
        weight: [rows of the weight, K].
        rows: [N] int32 or int64.
        is_row: [N] whether a row is there.
        columns: K.
        first_block: Of BLOCK_K columns.
        last_block: One past the last.
        BLOCK_K: At least 16.
    """
    pointers = tile_pointers(x, x_rows, weight, rows, columns, BLOCK_K)
    for block in range(first_block, last_block):
        x_some, some = load_tiles(pointers, block * BLOCK_K, columns, is_x_row, is_row, BLOCK_K)
        sums = add_dot(sums, some, x_some)
    return sums


@triton.jit
def store_tile(out, sums, bias, out_rows, is_out_row, rows, is_row, stride):
    """Put sums [N, M] and the bias, if there is one, into rows [M] of `out`, columns [N]."""
    if bias is not None:
        sums += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[:, None]
    place = out_rows[None, :].to(tl.int64) * stride + rows[:, None]
    there = is_row[:, None] & is_out_row[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=there)
