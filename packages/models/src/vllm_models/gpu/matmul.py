"""Products with plain weights: y = x W^T + b, by the library or, where it pays, by a kernel.

    x [M, K], W [N, K], b [N], y [M, N]

`matmul_tiles` adds up in an order that only N and K decide, so that a row's result does not depend
on the other rows or on how many there are: the library's does. `matmul_rows` is for very few rows
of small weights, which the library leaves waiting on memory.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.splits import add_splits, num_splits
from vllm_models.gpu.tiles import dense_products, store_tile

_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 64, 64  # of tiles
_FEW_ROWS = 8
_SMALL_COLUMNS = 1024
_ROWS_N, _ROWS_K = 16, 256  # of the kernel for few rows


def dense_path(rows: int, out_features: int, in_features: int) -> Literal["library", "rows"]:
    """What multiplies where the order of sums is free.

    Args:
        rows: M.
        out_features: N.
        in_features: K.
    """
    is_small = in_features <= _SMALL_COLUMNS and out_features % _ROWS_N == 0
    return "rows" if rows <= _FEW_ROWS and is_small else "library"


def dense_matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, fixed_order: bool = False
) -> Tensor:
    """x [..., K] times the transposed weight [N, K]: [..., N].

    Args:
        x: Of the element type of the weight.
        weight: Contiguous.
        bias: [N].
        fixed_order: A row's result does not depend on the other rows, nor on how many there are.
    """
    rows = x.numel() // x.shape[-1]
    is_wide = weight.dtype == torch.float32  # nobody serves such models fast
    if not fixed_order and (is_wide or dense_path(rows, *weight.shape) == "library"):
        return F.linear(x, weight, bias)
    flat = x.reshape(rows, x.shape[-1]).contiguous()
    multiply = matmul_tiles if fixed_order else matmul_rows
    return multiply(flat, weight, bias).view(*x.shape[:-1], len(weight))


@triton.jit(do_not_specialize=["num_x_rows", "num_rows", "split_blocks"])
def _tiles_kernel(
    out,
    x,
    weight,
    bias,
    num_x_rows,
    num_rows,
    columns,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    x_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    is_row, is_x_row = rows < num_rows, x_rows < num_x_rows
    last = tl.minimum((split + 1) * split_blocks, tl.cdiv(columns, BLOCK_K))
    sums = dense_products(
        tl.zeros((BLOCK_N, BLOCK_M), tl.float32),
        *(x, x_rows, is_x_row, weight, rows, is_row, columns, split * split_blocks, last),
        BLOCK_K,
    )
    out_rows = split * num_x_rows + x_rows
    store_tile(out, sums, bias, out_rows, is_x_row, rows, is_row, num_rows)


def matmul_tiles(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K] times the transposed [N, K], in an order of sums that M does not change."""
    num_rows, columns = weight.shape
    blocks = triton.cdiv(columns, _BLOCK_K)
    splits = num_splits(triton.cdiv(num_rows, _BLOCK_N), blocks)
    grid = (triton.cdiv(len(x), _BLOCK_M), triton.cdiv(num_rows, _BLOCK_N), splits)
    sizes = (len(x), num_rows, columns, triton.cdiv(blocks, splits))
    out = x.new_empty(len(x), num_rows)
    parts = out if splits == 1 else _parts(splits, out)
    if len(x) > 0:
        _tiles_kernel[grid](
            *(parts, x, weight, bias if splits == 1 else None, *sizes),
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            BLOCK_K=_BLOCK_K,
        )
    return out if splits == 1 or len(x) == 0 else add_splits(parts, bias, out)


@triton.jit(do_not_specialize=["num_x_rows", "num_rows", "split_blocks"])
def _rows_kernel(
    out,
    x,
    weight,
    bias,
    num_x_rows,
    num_rows,
    columns,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    x_rows = tl.arange(0, BLOCK_M)
    is_row, is_x_row = rows < num_rows, x_rows < num_x_rows
    last = tl.minimum((split + 1) * split_blocks, tl.cdiv(columns, BLOCK_K))
    column = tl.arange(0, BLOCK_K)
    x_place = x + x_rows[:, None, None].to(tl.int64) * columns + column[None, None, :]
    weight_place = weight + rows[None, :, None].to(tl.int64) * columns + column[None, None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K), tl.float32)
    for block in range(split * split_blocks, last):
        first = block * BLOCK_K
        there = (first + column < columns)[None, None, :]
        some = tl.load(weight_place + first, mask=is_row[None, :, None] & there, other=0.0)
        x_some = tl.load(x_place + first, mask=is_x_row[:, None, None] & there, other=0.0)
        sums += x_some.to(tl.float32) * some.to(tl.float32)
    found = tl.sum(sums, 2)  # [M, N]
    if bias is not None:
        found += tl.load(bias + rows, mask=is_row, other=0.0).to(tl.float32)[None, :]
    place = (split * num_x_rows + x_rows[:, None]).to(tl.int64) * num_rows + rows[None, :]
    there = is_row[None, :] & is_x_row[:, None]
    tl.store(out + place, found.to(out.dtype.element_ty), mask=there)


def matmul_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K] times the transposed [N, K] for M of at most 8, without matrix units."""
    num_rows, columns = weight.shape
    blocks = triton.cdiv(columns, _ROWS_K)
    block_m = triton.next_power_of_2(max(1, len(x)))
    block_n = _ROWS_N if block_m <= 2 else _ROWS_N // 2 if block_m == 4 else _ROWS_N // 4
    splits = num_splits(triton.cdiv(num_rows, block_n), blocks)
    sizes = (len(x), num_rows, columns, triton.cdiv(blocks, splits))
    out = x.new_empty(len(x), num_rows)
    parts = out if splits == 1 else _parts(splits, out)
    if len(x) > 0:
        _rows_kernel[(triton.cdiv(num_rows, block_n), splits)](
            *(parts, x, weight, bias if splits == 1 else None, *sizes),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=_ROWS_K,
        )
    return out if splits == 1 or len(x) == 0 else add_splits(parts, bias, out)


def _parts(splits: int, out: Tensor) -> Tensor:
    return torch.empty((splits, *out.shape), dtype=torch.float32, device=out.device)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In float32."""
    found = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return found.to(x.dtype)


def variants() -> tuple[Variant, ...]:
    """Tiles with and without splits, and few rows."""
    types = {"out": "*bf16", "x": "*bf16", "weight": "*bf16"}
    sizes = dict.fromkeys(("num_x_rows", "num_rows", "columns", "split_blocks"), "i32")
    tile = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K}
    found = [
        Variant("matmul-tiles", _tiles_kernel, types | sizes, tile | {"bias": None}),
        Variant(
            "matmul-tiles-split",
            _tiles_kernel,
            types | sizes | {"out": "*fp32"},
            tile | {"bias": None},
        ),
    ]
    for block_m, block_n in ((1, _ROWS_N), (4, _ROWS_N // 2), (8, _ROWS_N // 4)):
        constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": _ROWS_K, "bias": None}
        found.append(Variant(f"matmul-rows-{block_m}", _rows_kernel, types | sizes, constants))
    return tuple(found)
