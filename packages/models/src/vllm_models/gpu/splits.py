"""Sums of products whose columns were split between programs, added up in their order.

    out[m, n] = parts[0, m, n] + parts[1, m, n] + ... + bias[n]

parts float32 [splits, M, N]; how many splits there are is said by the shape of the weight alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_PROGRAMS = 512  # that keep a device's memory busy
_MAX_SPLITS = 8
_TILE = 1024


def num_splits(programs: int, blocks: int, most: int = _MAX_SPLITS) -> int:
    """Programs that share the columns of a weight.

    Args:
        programs: That there are without splits.
        blocks: Of columns, of which each program gets at least two.
        most: Splits that are worth what their sums cost.
    """
    return max(1, min(_PROGRAMS // programs, blocks // 2, most, _MAX_SPLITS))


@triton.jit(do_not_specialize=["num_x_rows", "num_rows", "num_parts"])
def _add_splits_kernel(
    out, parts, bias, num_x_rows, num_rows, out_stride, num_parts, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < num_rows
    sums = tl.zeros((TILE,), tl.float32)
    for split in range(num_parts):
        place = (split * num_x_rows + row) * num_rows + column
        sums += tl.load(parts + place, mask=there, other=0.0)
    if bias is not None:
        sums += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, sums.to(out.dtype.element_ty), mask=there)


def add_splits(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the sums.

    Args:
        parts: float32 [splits, M, N].
        bias: [N], any floats.
        out: [M, N], any floats; rows may be apart.
    """
    num_parts, num_x_rows, num_rows = parts.shape
    _add_splits_kernel[(num_x_rows, triton.cdiv(num_rows, _TILE))](
        out, parts, bias, num_x_rows, num_rows, out.stride(0), num_parts, TILE=_TILE
    )
    return out


def reference(parts: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`add_splits`."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return out.copy_(total if bias is None else total + bias.float())


def variants() -> tuple[Variant, ...]:
    """For any sizes."""
    signature = {"out": "*bf16", "parts": "*fp32", "bias": "*bf16"}
    sizes = dict.fromkeys(("num_x_rows", "num_rows", "out_stride", "num_parts"), "i32")
    return (Variant("add_splits", _add_splits_kernel, {**signature, **sizes}, {"TILE": _TILE}),)
