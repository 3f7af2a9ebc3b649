"""Products with quantized weights of any format: y = x W^T + b, see `layout.Planes`.

    x [M, K], W [N, K] in planes, b [N], y [M, N]

Weights become numbers in registers. One row of x multiplies them there; more go to the matrix
units, with the weight as the left side, since it has many rows even where x has few. Columns may
be split between programs, whose sums a second kernel adds up in their order. For very many rows
the weight is first written out as numbers and the library multiplies.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.grouped_rows import dequantize
from vllm_models.gpu.launch import Variant
from vllm_models.gpu.layout import Layout, Planes, numbers_of
from vllm_models.gpu.planes import add_products, row_products
from vllm_models.gpu.splits import add_splits, num_splits
from vllm_models.gpu.tiles import store_tile

_MANY_ROWS = 2048  # from which on the library multiplies
_SCRATCH_ELEMENTS = 1 << 27  # of a weight that is written out as numbers


class Form(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        block_m: Rows of x; one of them does without matrix units.
        block_n: Rows of the weight.
        num_warps: Of a program.
        num_stages: Loads in flight.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2

    def shared_bytes(self, planes: Planes, element_size: int) -> int:
        """Shared memory of a program, at most; x has elements of a size."""
        layout = planes.layout
        weight = self.block_n * layout.block * (layout.low_bits + layout.high_bits) // 8
        x = self.block_m * layout.block * element_size
        return self.num_stages * (x + weight) + (1 << 13)


_ONE_ROW = Form(1, 32)
_FEW = (Form(16, 64, num_stages=3), Form(32, 64), Form(64, 64))
_MANY = (Form(128, 128, num_warps=8), Form(64, 128, num_warps=8), Form(64, 64), Form(32, 64))
_FIXED = (Form(64, 64), Form(32, 64), Form(16, 64))


def form_for(
    rows: int, planes: Planes, element_size: int, shared_memory: int, fixed_order: bool
) -> Form | None:
    """The form of a product, or None where the library multiplies.

    Args:
        rows: Of x.
        planes: The weight.
        element_size: Bytes of an element of x.
        shared_memory: Bytes that a program may have.
        fixed_order: The order of sums may not depend on `rows`, so neither may the form.
    """
    if rows >= _MANY_ROWS and not fixed_order:
        return None
    if rows == 1 and not fixed_order:
        return _ONE_ROW
    few = tuple(form for form in _FEW if rows <= form.block_m)
    forms = _FIXED if fixed_order else few or _MANY
    fits = (form for form in forms if form.shared_bytes(planes, element_size) <= shared_memory)
    return next(fits, Form(16, 64, num_stages=1))


def splits_for(rows: int, planes: Planes, form: Form, fixed_order: bool) -> int:
    """Programs that share the columns.

    Args:
        rows: Of x; the more there are, the more the sums of the splits cost beside the weight.
        planes: The weight.
        form: Of the product.
        fixed_order: The number may not depend on `rows`.
    """
    programs = triton.cdiv(planes.rows, form.block_n)
    if fixed_order:
        return num_splits(programs, planes.num_blocks)
    bits = planes.layout.low_bits + planes.layout.high_bits
    most = planes.columns * bits // (64 * rows)  # reads and writes of sums, in bits of a column
    return num_splits(programs * triton.cdiv(rows, form.block_m), planes.num_blocks, most)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return 1 << 18
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit(do_not_specialize=["num_x_rows", "num_rows", "blocks_per_split"])
def _matmul_kernel(
    out,
    x,
    bias,
    low,
    high,
    scales,
    offsets,
    factors,
    offset_factors,
    table,
    num_x_rows,
    num_rows,
    columns,
    out_stride,
    blocks_per_split,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    x_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    is_row, is_x_row = rows < num_rows, x_rows < num_x_rows
    weight = (
        (low, high, table),
        (scales, offsets, factors, offset_factors),
        (num_rows, columns),
    )
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(columns, 8 * LAYOUT.run))
    if BLOCK_M == 1:
        sums = row_products(x, weight, rows, is_row, first_block, last_block, LAYOUT)[:, None]
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        sums = add_products(
            *(sums, x, x_rows, is_x_row, weight, rows, is_row, first_block, last_block), LAYOUT
        )
    out_rows = split * num_x_rows + x_rows
    store_tile(out, sums, bias, out_rows, is_x_row, rows, is_row, out_stride)


def grouped_matmul(
    x: Tensor,
    planes: Planes,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    fixed_order: bool = False,
) -> Tensor:
    """x [M, K] times the transposed weight [N, K], in the element type of x: [M, N].

    Args:
        x: Any floats.
        planes: The weight.
        bias: [N], any floats.
        out: [M, N] to write to, whose rows may be apart.
        fixed_order: A row's result does not depend on the other rows, nor on how many there are.
    """
    out = x.new_empty(len(x), planes.rows) if out is None else out
    form = form_for(len(x), planes, x.element_size(), _shared_memory(x.device), fixed_order)
    if len(x) == 0:
        return out
    if form is None:
        return _by_library(x, planes, bias, out)
    splits = splits_for(len(x), planes, form, fixed_order)
    if splits == 1:
        _launch(x.contiguous(), planes, bias, out, form, splits)
        return out
    parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=x.device)
    _launch(x.contiguous(), planes, None, parts, form, splits)
    return add_splits(parts, bias, out)


def _launch(
    x: Tensor, planes: Planes, bias: Tensor | None, out: Tensor, form: Form, splits: int
) -> None:
    grid = (
        triton.cdiv(len(x), form.block_m),
        triton.cdiv(planes.rows, form.block_n),
        splits,
    )
    _matmul_kernel[grid](
        *(out, x, bias, *planes.tensors),
        *(len(x), planes.rows, planes.columns, out.stride(-2)),
        triton.cdiv(planes.num_blocks, splits),
        LAYOUT=planes.layout,
        BLOCK_M=form.block_m,
        BLOCK_N=form.block_n,
        num_warps=form.num_warps,
        num_stages=form.num_stages,
    )


def _by_library(x: Tensor, planes: Planes, bias: Tensor | None, out: Tensor) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    step = max(1, min(planes.rows, _SCRATCH_ELEMENTS // planes.columns))
    for first in range(0, planes.rows, step):
        some = slice(first, min(first + step, planes.rows))
        weight = dequantize(planes, some, x.dtype)
        out[:, some] = F.linear(x, weight, None if bias is None else bias[some])
    return out


def reference(x: Tensor, planes: Planes, bias: Tensor | None = None) -> Tensor:
    """`grouped_matmul` with all weights as numbers."""
    found = F.linear(x.float(), numbers_of(planes), None if bias is None else bias.float())
    return found.to(x.dtype)


_FORMATS = {
    "gptq": (Layout("integer", 4, 0, 128, 32, 0, "number", "zero"), "*fp16", "*u8"),
    "q4_k": (Layout("integer", 4, 0, 32, 32, 0, "step", "step"), "*u8", "*u8"),
    "q6_k": (Layout("integer", 4, 2, 16, 16, 32, "step", "none"), "*i8", "constexpr"),
    "q8_0": (Layout("integer", 8, 0, 32, 32, 128, "number", "none"), "*fp16", "constexpr"),
    "mxfp4": (Layout("e2m1", 4, 0, 32, 32, 0, "exponent", "none"), "*u8", "constexpr"),
    "nf4": (Layout("table", 4, 0, 64, 32, 0, "number", "none"), "*fp32", "constexpr"),
    "fp8": (Layout("e4m3", 8, 0, 128, 32, 0, "number", "none"), "*fp32", "constexpr"),
}
_UNIT_TYPES = {0: "constexpr", 1: "*u8", 2: "*i16", 4: "*i32", 8: "*u8"}


def variants() -> tuple[Variant, ...]:
    """Every format at one row, few rows and many."""
    found: list[Variant] = []
    for name, (layout, scales, offsets) in _FORMATS.items():
        for form in (_ONE_ROW, _FEW[0], _FEW[-1], _MANY[0]):
            constants = {"LAYOUT": layout, "BLOCK_M": form.block_m, "BLOCK_N": form.block_n}
            signature = {
                **dict.fromkeys(("out",), "*bf16" if form is _MANY[0] else "*fp32"),
                "x": "*bf16",
                "bias": "constexpr",
                "low": _UNIT_TYPES[layout.low_bits],
                "high": _UNIT_TYPES[layout.high_bits],
                "scales": scales,
                "offsets": offsets,
                "factors": "*fp16" if layout.scale == "step" else "constexpr",
                "offset_factors": "*fp16" if layout.offset == "step" else "constexpr",
                "table": "*fp16" if layout.number == "table" else "constexpr",
                **dict.fromkeys(
                    ("num_x_rows", "num_rows", "columns", "out_stride", "blocks_per_split"), "i32"
                ),
            }
            absent = [key for key, kind in signature.items() if kind == "constexpr"]
            found.append(
                Variant(
                    f"grouped_matmul-{name}-{form.block_m}",
                    _matmul_kernel,
                    {key: kind for key, kind in signature.items() if key not in absent},
                    {**constants, **dict.fromkeys(absent)},
                    form.num_warps,
                    form.num_stages,
                )
            )
    return tuple(found)
