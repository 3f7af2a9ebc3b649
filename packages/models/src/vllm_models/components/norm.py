"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_models.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension and scale each component."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x, self.weight, self.eps)
