"""Quantized weights written out as numbers: all rows, some neighbours, or rows by their index.

out[i, k] = W[rows[i], k]     or     W[first + i, k]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.layout import Layout, Planes, numbers_of
from vllm_models.gpu.planes import load_block, weight_run

_BLOCK = 16


@triton.jit(do_not_specialize=["num_out_rows", "first_row"])
def _rows_kernel(
    out,
    row_ids,
    low,
    high,
    scales,
    offsets,
    factors,
    offset_factors,
    table,
    num_out_rows,
    first_row,
    num_rows,
    columns,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(1)
    out_rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = out_rows < num_out_rows
    if row_ids is None:
        rows = first_row + out_rows
    else:
        rows = tl.load(row_ids + out_rows, mask=is_row, other=0)
    weight = (
        (low, high, table),
        (scales, offsets, factors, offset_factors),
        (num_rows, columns),
    )
    units, own_factors = load_block(weight, rows, is_row, block, LAYOUT)
    own_scales = own_factors
    for j in tl.static_range(8):
        first, numbers, own_scales = weight_run(
            weight, block, units, own_factors, own_scales, rows, is_row, j, LAYOUT
        )
        column = first + tl.arange(0, LAYOUT.run)[None, :]
        place = out_rows[:, None].to(tl.int64) * columns + column
        there = is_row[:, None] & (column < columns)
        tl.store(out + place, numbers.to(out.dtype.element_ty), mask=there)


def dequantize(planes: Planes, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some neighbours: [n, K].

    Args:
        planes: The weight.
        rows: With both ends.
        dtype: Of the result.
    """
    shape = (rows.stop - rows.start, planes.columns)
    out = torch.empty(shape, dtype=dtype, device=planes.low.device)
    _launch(out, None, planes, rows.start)
    return out


def gather_rows(planes: Planes, row_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows by their index: [T] -> [T, K]."""
    out = torch.empty(len(row_ids), planes.columns, dtype=dtype, device=row_ids.device)
    _launch(out, row_ids, planes, 0)
    return out


def _launch(out: Tensor, row_ids: Tensor | None, planes: Planes, first_row: int) -> None:
    if len(out) == 0:
        return
    _rows_kernel[(triton.cdiv(len(out), _BLOCK), planes.num_blocks)](
        *(out, row_ids, *planes.tensors),
        *(len(out), first_row, planes.rows, planes.columns),
        LAYOUT=planes.layout,
        BLOCK=_BLOCK,
    )


def reference(planes: Planes, row_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`gather_rows`."""
    return numbers_of(planes)[row_ids].to(dtype)


def variants() -> tuple[Variant, ...]:
    """Two formats, as numbers of a prompt and as embeddings."""
    pointers = {"out": "*bf16", "low": "*i32", "scales": "*u8", "offsets": "*u8"}
    factors = {"factors": "*fp16", "offset_factors": "*fp16"}
    sizes = dict.fromkeys(("num_out_rows", "first_row", "num_rows", "columns"), "i32")
    layout = Layout("integer", 4, 0, 32, 32, 0, "step", "step")
    constants = {"LAYOUT": layout, "BLOCK": _BLOCK, "high": None, "table": None}
    return (
        Variant(
            "grouped_rows-q4_k-all",
            _rows_kernel,
            {**pointers, **factors, **sizes},
            {**constants, "row_ids": None},
        ),
        Variant(
            "grouped_rows-q4_k-some",
            _rows_kernel,
            {**pointers, "row_ids": "*i64", **factors, **sizes},
            constants,
        ),
    )
