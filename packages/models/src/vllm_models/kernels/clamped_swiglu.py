"""Gated activation with limits: with g = min(gate, limit) and u = up within +-limit,
y = g * sigmoid(alpha * g) * (u + 1). Halves as in `silu_mul`.

gate_up [T, 2F] -> [T, F].
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.native import pointwise
from vllm_models.native.library import library_for


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Activate the first half and multiply it by the second, plus 1."""
    if (gpu := kernels_for(gate_up)) is not None:
        return gpu.clamped_swiglu(gate_up, alpha, limit)
    if (library := library_for(gate_up)) is not None:
        return pointwise.gate(library, gate_up, "clamped_swiglu", alpha, limit)
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def reference(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """The textbook form."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = torch.where(gate > limit, limit, gate)
    up = torch.where(up.abs() > limit, limit * up.sign(), up)
    return (gate / (1 + torch.exp(-alpha * gate)) * (up + 1)).to(gate_up.dtype)
