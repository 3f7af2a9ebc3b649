"""Gated activation: silu(gate) * up, where gate and up are the two halves of the last dimension.

gate_up [T, 2F] -> [T, F].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.native import pointwise
from vllm_models.native.library import library_for


def silu_mul(gate_up: Tensor) -> Tensor:
    """Activate the first half and multiply it by the second."""
    if (gpu := kernels_for(gate_up)) is not None:
        return gpu.silu_mul(gate_up)
    if (library := library_for(gate_up)) is not None:
        return pointwise.gate(library, gate_up, "silu")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def reference(gate_up: Tensor) -> Tensor:
    """The textbook form."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
