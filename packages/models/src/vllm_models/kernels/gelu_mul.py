"""Gated activation: gelu(gate) * up, with gelu in its tanh form; halves as in `silu_mul`.

gate_up [T, 2F] -> [T, F].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.native import pointwise
from vllm_models.native.library import library_for


def gelu_mul(gate_up: Tensor) -> Tensor:
    """Activate the first half and multiply it by the second."""
    if (gpu := kernels_for(gate_up)) is not None:
        return gpu.gelu_mul(gate_up)
    if (library := library_for(gate_up)) is not None:
        return pointwise.gate(library, gate_up, "gelu_tanh")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def reference(gate_up: Tensor) -> Tensor:
    """The textbook form."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return (gate * 0.5 * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)
