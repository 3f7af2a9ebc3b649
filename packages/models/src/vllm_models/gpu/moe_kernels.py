"""The kernels of `moe_matmul`: one pair of a token and an expert, and blocks that share an expert.

They take the tensors of `StackedExperts` and the distances from expert to expert in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_models.gpu.planes import add_products, row_products
from vllm_models.gpu.tiles import dense_products, store_tile


@triton.jit
def _at(tensor, expert, stride):
    """Where an expert's part of a tensor begins."""
    return tensor + expert.to(tl.int64) * stride


@triton.jit
def _own_weight(expert, planes, strides, size):
    """An expert's weight, see `planes`. Where a layout has no tensor the low bits stand in, since
    no function under Triton 3.6 returns None.
    """
    low, high, scales, offsets, factors, offset_factors, table = planes
    codes = (
        _at(low, expert, strides[0]),
        low if high is None else _at(high, expert, strides[1]),
        low if table is None else table,
    )
    steps = (
        low if scales is None else _at(scales, expert, strides[2]),
        low if offsets is None else _at(offsets, expert, strides[3]),
        low if factors is None else _at(factors, expert, strides[4]),
        low if offset_factors is None else _at(offset_factors, expert, strides[5]),
    )
    return codes, steps, size


@triton.jit
def _dense_row_products(
    row, weight, rows, is_row, columns, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """[N] float32: products of rows of a plain weight with a row of x."""
    weight += rows[:, None].to(tl.int64) * columns
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        there = column < columns
        some = tl.load(weight + column[None, :], mask=is_row[:, None] & there[None, :], other=0.0)
        x_some = tl.load(row + column, mask=there, other=0.0).to(tl.float32)
        products += some.to(tl.float32) * x_some[None, :]
    return tl.sum(products, 1)


@triton.jit
def pair_kernel(
    out,
    x,
    chosen,
    bias,
    low,
    high,
    scales,
    offsets,
    factors,
    offset_factors,
    table,
    low_stride,
    high_stride,
    scales_stride,
    offsets_stride,
    factors_stride,
    offset_factors_stride,
    pairs_per_row,
    num_rows,
    columns,
    bias_stride,
    out_stride,
    LAYOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N rows of the weight for one pair."""
    pair = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_rows
    expert = tl.load(chosen + pair)
    row = x + (pair // pairs_per_row).to(tl.int64) * columns
    if LAYOUT is None:
        weight = _at(low, expert, low_stride)
        sums = _dense_row_products(row, weight, rows, is_row, columns, BLOCK_N, BLOCK_K)
    else:
        planes = (low, high, scales, offsets, factors, offset_factors, table)
        strides = (low_stride, high_stride, scales_stride, offsets_stride)
        strides += (factors_stride, offset_factors_stride)
        weight = _own_weight(expert, planes, strides, (num_rows, columns))
        num_blocks = tl.cdiv(columns, 8 * LAYOUT.run)
        sums = row_products(row, weight, rows, is_row, 0, num_blocks, LAYOUT)
    if bias is not None:
        own_bias = _at(bias, expert, bias_stride)
        sums += tl.load(own_bias + rows, mask=is_row, other=0.0).to(tl.float32)
    place = pair.to(tl.int64) * out_stride + rows
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_pairs"])
def blocks_kernel(
    out,
    x,
    pairs,
    block_experts,
    num_blocks,
    bias,
    low,
    high,
    scales,
    offsets,
    factors,
    offset_factors,
    table,
    low_stride,
    high_stride,
    scales_stride,
    offsets_stride,
    factors_stride,
    offset_factors_stride,
    num_pairs,
    pairs_per_row,
    num_rows,
    columns,
    bias_stride,
    out_stride,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_N rows of the weight for BLOCK_M pairs that share an expert."""
    block = tl.program_id(1)
    if block < tl.load(num_blocks):
        expert = tl.load(block_experts + block)
        pair = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
        is_pair = pair < num_pairs
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_row = rows < num_rows
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        x_row = pair // pairs_per_row
        if LAYOUT is None:
            weight = _at(low, expert, low_stride)
            last = tl.cdiv(columns, BLOCK_K)
            sums = dense_products(
                *(sums, x, x_row, is_pair, weight, rows, is_row, columns, 0, last), BLOCK_K
            )
        else:
            planes = (low, high, scales, offsets, factors, offset_factors, table)
            strides = (low_stride, high_stride, scales_stride, offsets_stride)
            strides += (factors_stride, offset_factors_stride)
            weight = _own_weight(expert, planes, strides, (num_rows, columns))
            last = tl.cdiv(columns, 8 * LAYOUT.run)
            sums = add_products(*(sums, x, x_row, is_pair, weight, rows, is_row, 0, last), LAYOUT)
        own_bias = bias if bias is None else _at(bias, expert, bias_stride)
        store_tile(out, sums, own_bias, pair, is_pair, rows, is_row, out_stride)
