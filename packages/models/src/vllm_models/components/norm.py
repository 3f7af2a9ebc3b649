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


class OffsetRMSNorm(RMSNorm):
    """The same, with weights that are saved as their difference from 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x.float(), self.weight.float() + 1, self.eps).to(x.dtype)


class UnitRMSNorm(nn.Module):
    """The same without weights."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x, torch.ones(self.width, dtype=x.dtype, device=x.device), self.eps)
