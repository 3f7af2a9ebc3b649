"""Root-mean-square normalisation of rows, alone or of a sum that is kept as well:

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)

x [..., M], weight [M] or none. Sums are in float32; a row's result does not depend on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024  # numbers per program at least: short rows share one
_PER_THREAD = 8  # 128 bits of bfloat16


@triton.jit
def inverse_rms(wide, eps, WIDTH: tl.constexpr):
    """Of rows of float32 numbers [N, tile], zeros beyond WIDTH: [N, 1]."""
    return tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)[:, None]


@triton.jit
def scaled(wide, inverse, weight, columns, there, OFFSET: tl.constexpr):
    """The norm of those numbers [N, tile] of rows that stand in some columns."""
    normed = wide * inverse
    if weight is not None:
        factors = tl.load(weight + columns, mask=there, other=0.0).to(tl.float32)
        normed *= (factors + OFFSET)[None, :]
    return normed


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    out,
    x,
    weight,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, TILE)
    there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    start = (rows // inner).to(tl.int64) * outer_stride + rows % inner * inner_stride
    wide = tl.load(x + start[:, None] + columns[None, :], mask=there, other=0.0).to(tl.float32)
    normed = scaled(wide, inverse_rms(wide, eps, WIDTH), weight, columns, columns < WIDTH, OFFSET)
    place = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(out + place, normed, mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _add_norm_kernel(
    total,
    out,
    x,
    residual,
    weight,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, TILE)
    there = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    first = residual + rows[:, None] * residual_stride + columns[None, :]
    second = x + rows[:, None] * x_stride + columns[None, :]
    added = tl.load(first, mask=there, other=0.0).to(tl.float32)
    added += tl.load(second, mask=there, other=0.0).to(tl.float32)
    rounded = added.to(total.dtype.element_ty)
    place = rows[:, None] * WIDTH + columns[None, :]
    tl.store(total + place, rounded, mask=there)
    wide = rounded.to(tl.float32)
    normed = scaled(wide, inverse_rms(wide, eps, WIDTH), weight, columns, columns < WIDTH, OFFSET)
    tl.store(out + place, normed, mask=there)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the last dimension: [..., M] -> [..., M], contiguous.

    Args:
        x: Rows may be apart, as the heads of some tokens [T, H, M] are.
        weight: [M]; None is one everywhere.
        eps: Added to the mean square.
        offset: Added to the weight.
    """
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x if x.dim() == 3 else x.reshape(-1, 1, width)
    rows = rows if rows.stride(2) == 1 else rows.contiguous()
    num_rows, tile = rows.shape[0] * rows.shape[1], _tile(width)
    _norm_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        *(out, rows, weight, num_rows, rows.shape[1], rows.stride(0), rows.stride(1), eps),
        WIDTH=width,
        OFFSET=offset,
        **tile,
        num_warps=_warps(tile),
    )
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """residual + x in x's type, and its norm: both [T, M], contiguous.

    Args:
        x: [T, M]; rows may be apart.
        residual: Like x.
        weight: [M]; None is one everywhere.
        eps: Added to the mean square.
        offset: Added to the weight.
    """
    x, residual = (t if t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    (num_rows, width), tile = x.shape, _tile(x.shape[1])
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _add_norm_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
        *(total, out, x, residual, weight, num_rows, x.stride(0), residual.stride(0), eps),
        WIDTH=width,
        OFFSET=offset,
        **tile,
        num_warps=_warps(tile),
    )
    return total, out


def _tile(width: int) -> dict[str, int]:
    """Rows of a program and numbers of each."""
    tile = triton.next_power_of_2(width)
    return {"ROWS": max(1, _TILE // tile), "TILE": tile}


def _warps(tile: dict[str, int]) -> int:
    return min(16, tile["ROWS"] * tile["TILE"] // (32 * _PER_THREAD))


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = x.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed if weight is None else normed * (weight.float() + offset)).to(x.dtype)


def variants() -> tuple[Variant, ...]:
    """Heads of 128 numbers, and the widths of Qwen3-0.6B, Qwen3-30B-A3B and Llama-3.1-8B."""
    return (
        *(_variant("rms_norm", _norm_kernel, width) for width in (128, 1024, 2048, 4096)),
        *(_variant("add_rms_norm", _add_norm_kernel, width) for width in (1024, 2048, 4096)),
    )


def _variant(name: str, kernel: triton.JITFunction, width: int) -> Variant:
    pointers, numbers = ("out", "x", "weight"), ("inner", "outer_stride", "inner_stride")
    if kernel is _add_norm_kernel:
        pointers, numbers = ("total", *pointers, "residual"), ("x_stride", "residual_stride")
    tile = _tile(width)
    return Variant(
        f"{name}-bf16-{width}",
        kernel,
        {
            **dict.fromkeys(pointers, "*bf16"),
            **dict.fromkeys(("num_rows", *numbers), "i32"),
            "eps": "fp32",
        },
        {"WIDTH": width, "OFFSET": 0.0, **tile},
        num_warps=_warps(tile),
    )
