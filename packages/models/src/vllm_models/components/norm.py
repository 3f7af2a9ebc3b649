"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_models.kernels.rms_norm import Norm, add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last dimension and scale each component."""

    offset = 0.0  # added to the weights

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x, self.weight, self.eps, self.offset)

    def after(self, residual: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """residual + x, or residual alone, and the norm of that: both [T, width]."""
        if x is None:
            return residual, self(residual)
        return add_rms_norm(x, residual, self.weight, self.eps, self.offset)

    def terms(self) -> Norm:
        """For an operator that normalises what it reads."""
        return Norm(self.weight, self.eps, self.offset)


class OffsetRMSNorm(RMSNorm):
    """The same, with weights that are saved as their difference from 1."""

    offset = 1.0


class UnitRMSNorm(nn.Module):
    """The same without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return rms_norm(x, None, self.eps)
