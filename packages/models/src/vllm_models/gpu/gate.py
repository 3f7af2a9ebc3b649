"""Gated activations: y = activation(gate) * up, where gate and up are the halves of a row.

    silu      gate * sigmoid(gate) * up
    gelu      gate * sigmoid(2 z) * up,  z = sqrt(2 / pi) * (gate + 0.044715 gate^3)
    clamped   g * sigmoid(alpha g) * (u + 1),  g = min(gate, limit), u = up within +-limit

gate_up [T, 2F] -> [T, F], computed in float32 and rounded once. The gelu is the one of tanh.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE, _NUM_WARPS = 1024, 4  # a thread reads 128 bits of each half
_SILU, _GELU, _CLAMPED = 0, 1, 2


@triton.jit
def gated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """Of float32 numbers."""
    if ACTIVATION == 0:
        return gate * tl.sigmoid(gate) * up
    if ACTIVATION == 1:
        twice = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(twice) * up
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate * tl.sigmoid(alpha * gate) * (up + 1.0)


@triton.jit
def _gate_kernel(
    out, gate_up, width, stride, alpha, limit, ACTIVATION: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=there).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=there).to(tl.float32)
    tl.store(out + row * width + columns, gated(gate, up, alpha, limit, ACTIVATION), mask=there)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]; rows may be apart."""
    return _launch(gate_up, _SILU)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]; rows may be apart."""
    return _launch(gate_up, _GELU)


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """[T, 2F] -> [T, F]; rows may be apart."""
    return _launch(gate_up, _CLAMPED, alpha, limit)


def _launch(gate_up: Tensor, activation: int, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _gate_kernel[(num_rows, triton.cdiv(width, _TILE))](
        *(out, gate_up, width, gate_up.stride(0), alpha, limit),
        ACTIVATION=activation,
        TILE=_TILE,
        num_warps=_NUM_WARPS,
    )
    return out


def reference(gate_up: Tensor, activation: str, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    """In plain torch: `activation` is the launcher's name, alpha and limit are of the last one."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    match activation:
        case "silu_mul":
            out = torch.nn.functional.silu(gate) * up
        case "gelu_mul":
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            out = gate * 0.5 * (1 + torch.tanh(inner)) * up
        case _:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            out = gate * torch.sigmoid(alpha * gate) * (up + 1)
    return out.to(gate_up.dtype)


def variants() -> tuple[Variant, ...]:
    """The same for every width."""
    signature = {
        **dict.fromkeys(("out", "gate_up"), "*bf16"),
        **dict.fromkeys(("width", "stride"), "i32"),
        **dict.fromkeys(("alpha", "limit"), "fp32"),
    }
    names = {"silu_mul": _SILU, "gelu_mul": _GELU, "clamped_swiglu": _CLAMPED}
    return tuple(
        Variant(
            f"{name}-bf16",
            _gate_kernel,
            signature,
            {"ACTIVATION": activation, "TILE": _TILE},
            num_warps=_NUM_WARPS,
        )
        for name, activation in names.items()
    )
