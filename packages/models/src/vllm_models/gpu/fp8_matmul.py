"""Products with weights of 8-bit floats, on devices that multiply those: y = x W^T + b.

    a[m, g] = max |x[m, columns of g]| / 448        codes[m, k] = e4m3(x[m, k] / a[m, g])
    y[m, n] = sum over g of a[m, g] scales[g, n] (sum over k in g of codes[m, k] W[n, k]) + b[n]

A group g is the whole row, where the library multiplies, or 128 columns, where a kernel does. Few
rows wait for the weight alone: those are multiplied as they are, by `grouped_matmul`.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.dot import add_dot
from vllm_models.gpu.grouped_matmul import grouped_matmul
from vllm_models.gpu.launch import Variant
from vllm_models.gpu.layout import Planes, numbers_of
from vllm_models.gpu.tiles import load_tiles, store_tile, tile_pointers

_LARGEST = 448.0  # of e4m3
_FEW_ROWS = 16
_GROUP = 128
_ALIGNED = 16  # sizes that the library takes are multiples of it
_CAPABILITY = (8, 9)  # of the first devices that multiply FP8
_BLOCK_M, _BLOCK_N = 64, 128
_WARPS = 8
_TILE = 1024


def fp8_path(
    rows: int, planes: Planes, dtype: torch.dtype, capability: tuple[int, int]
) -> Literal["numbers", "library", "groups"]:
    """What multiplies: the weight as numbers in registers, the library, or the kernel for groups.

    Args:
        rows: Of x.
        planes: The weight.
        dtype: Of x.
        capability: Of the device, (0, 0) for none.
    """
    is_aligned = planes.rows % _ALIGNED == 0 and planes.columns % _ALIGNED == 0
    can = capability >= _CAPABILITY and dtype == torch.bfloat16 and is_aligned
    if not can or rows <= _FEW_ROWS:
        return "numbers"
    if len(planes.scales) == 1:
        return "library"
    return "groups" if planes.layout.group == _GROUP else "numbers"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def fp8_matmul(
    x: Tensor,
    planes: Planes,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    fixed_order: bool = False,
) -> Tensor:
    """x [M, K] times the transposed weight [N, K], in the element type of x: [M, N].

    Args:
        x: Any floats.
        planes: The weight, of 8-bit floats.
        bias: [N], any floats.
        out: [M, N] to write to, whose rows may be apart.
        fixed_order: A row's result does not depend on the other rows, nor on how many there are.
    """
    path = fp8_path(len(x), planes, x.dtype, _capability(x.device))
    if fixed_order or path == "numbers":
        return grouped_matmul(x, planes, bias, out, fixed_order)
    if path == "groups":
        return matmul_groups(*quantize_rows(x, _GROUP), planes, bias, x.dtype, out)
    found = _by_library(x, planes, bias)
    return found if out is None else out.copy_(found)


def _by_library(x: Tensor, planes: Planes, bias: Tensor | None) -> Tensor:
    codes, scales = quantize_rows(x, planes.columns, -len(x) % _ALIGNED)
    found = torch._scaled_mm(
        codes,
        planes.low.view(torch.float8_e4m3fn).T,
        scale_a=scales,
        scale_b=planes.scales,
        bias=None if bias is None else bias.to(x.dtype),
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
    return found[: len(x)]


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(codes, scales, x, num_rows, columns, group, TILE: tl.constexpr):
    row, index = tl.program_id(0), tl.program_id(1)
    start = row.to(tl.int64) * columns
    column = tl.arange(0, TILE)
    last = tl.minimum((index + 1) * group, columns)
    largest = tl.zeros((TILE,), tl.float32)
    for first in range(index * group, last, TILE):
        there = (first + column < last) & (row < num_rows)
        some = tl.load(x + start + first + column, mask=there, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(some))
    scale = tl.maximum(tl.max(largest, 0), 1e-10) / 448.0
    tl.store(scales + row * tl.num_programs(1) + index, scale)
    for first in range(index * group, last, TILE):
        there = first + column < last
        is_number = there & (row < num_rows)
        some = tl.load(x + start + first + column, mask=is_number, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(some / scale, -448.0), 448.0)
        place = codes + start + first + column
        tl.store(place, scaled.to(codes.dtype.element_ty), mask=there)


def quantize_rows(x: Tensor, group: int, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Activations as 8-bit floats.

    Args:
        x: [M, K].
        group: Columns that share a scale.
        padding: Rows of zeros behind those of x.

    Returns:
        e4m3 [M + padding, K] and float32 [M + padding, groups].
    """
    rows, groups = len(x) + padding, triton.cdiv(x.shape[1], group)
    codes = torch.empty(rows, x.shape[1], dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    tile = min(_TILE, triton.next_power_of_2(group))
    _quantize_kernel[(rows, groups)](
        codes, scales, x.contiguous(), len(x), x.shape[1], group, TILE=tile
    )
    return codes, scales


@triton.jit(do_not_specialize=["num_x_rows", "num_rows"])
def _groups_kernel(
    out,
    codes,
    x_scales,
    weight,
    scales,
    bias,
    num_x_rows,
    num_rows,
    columns,
    out_stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    x_rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_x_row = rows < num_rows, x_rows < num_x_rows
    num_groups = tl.cdiv(columns, GROUP)
    pointers = tile_pointers(codes, x_rows, weight, rows, columns, GROUP)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in range(num_groups):
        x_some, some = load_tiles(pointers, group * GROUP, columns, is_x_row, is_row, GROUP)
        scale = tl.load(scales + group * num_rows + rows, mask=is_row, other=0.0)
        x_scale = tl.load(x_scales + x_rows * num_groups + group, mask=is_x_row, other=0.0)
        products = add_dot(tl.zeros((BLOCK_N, BLOCK_M), tl.float32), some, x_some)
        sums += products * (scale[:, None] * x_scale[None, :])
    store_tile(out, sums, bias, x_rows, is_x_row, rows, is_row, out_stride)


def matmul_groups(
    codes: Tensor,
    x_scales: Tensor,
    planes: Planes,
    bias: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Activations in 8-bit floats times the transposed weight: [M, N].

    Args:
        codes: e4m3 [M, K].
        x_scales: float32 [M, K / 128].
        planes: The weight, of 8-bit floats in groups of 128 columns.
        bias: [N], any floats.
        dtype: Of the result.
        out: [M, N] to write to, whose rows may be apart.
    """
    if out is None:
        out = torch.empty(len(codes), planes.rows, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(len(codes), _BLOCK_M), triton.cdiv(planes.rows, _BLOCK_N))
    _groups_kernel[grid](
        *(out, codes, x_scales, planes.low.view(torch.float8_e4m3fn), planes.scales, bias),
        *(len(codes), planes.rows, planes.columns, out.stride(0)),
        GROUP=_GROUP,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=_BLOCK_N,
        num_warps=_WARPS,
    )
    return out


def reference(
    x: Tensor, planes: Planes, bias: Tensor | None = None, group: int | None = None
) -> Tensor:
    """`fp8_matmul` in float32, with activations as 8-bit floats if they share scales in groups."""
    numbers = x.float()
    if group is not None:
        short = -x.shape[1] % group
        grouped = F.pad(numbers, (0, short)).unflatten(1, (-1, group))
        scales = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / _LARGEST
        codes = (grouped / scales).to(torch.float8_e4m3fn)
        numbers = (codes.float() * scales).flatten(1)[:, : x.shape[1]]
    found = F.linear(numbers, numbers_of(planes), None if bias is None else bias.float())
    return found.to(x.dtype)


def variants() -> tuple[Variant, ...]:
    """Whole rows and groups of activations, and the product of groups."""
    quantize = {"codes": "*fp8e4nv", "scales": "*fp32", "x": "*bf16"}
    sizes = dict.fromkeys(("num_rows", "columns", "group"), "i32")
    product = {
        **{"out": "*bf16", "codes": "*fp8e4nv", "x_scales": "*fp32"},
        **{"weight": "*fp8e4nv", "scales": "*fp32"},
        **dict.fromkeys(("num_x_rows", "num_rows", "columns", "out_stride"), "i32"),
    }
    tile = {"GROUP": _GROUP, "BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "bias": None}
    return (
        Variant("fp8_quantize-row", _quantize_kernel, quantize | sizes, {"TILE": _TILE}),
        Variant("fp8_quantize-group", _quantize_kernel, quantize | sizes, {"TILE": _GROUP}),
        Variant("fp8_matmul-groups", _groups_kernel, product, tile, num_warps=_WARPS),
    )
