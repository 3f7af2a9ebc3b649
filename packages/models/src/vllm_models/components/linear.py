"""Linear layers. How a weight is stored and multiplied is a `LinearMethod`, which no architecture
sees; which tensors of the checkpoint make up a layer is told by `parts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearMethod(Protocol):
    """One way to hold the weight of a linear layer."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Add the parameters to the layer."""
        ...

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        ...


class Dense:
    """The weight as it is, [out_features, in_features]."""

    def create(self, layer: nn.Module, in_features: int, out_features: int) -> None:
        """Add `weight`."""
        layer.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the transposed weight."""
        return F.linear(x, layer.weight, bias)


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: Width of x.
        out_features: Width of y, or the widths of the checkpoint's layers that are stacked here,
            by name: `{"q_proj": 64, "k_proj": 32, "v_proj": 32}` reads three neighbours of this
            layer as one.
        bias: Whether b is there.
        method: How the weight is held.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        bias: bool = False,
        method: LinearMethod | None = None,
    ) -> None:
        super().__init__()
        self.parts = {} if isinstance(out_features, int) else dict(out_features)
        width = out_features if isinstance(out_features, int) else sum(self.parts.values())
        self.method = method or Dense()
        self.method.create(self, in_features, width)
        self.bias = nn.Parameter(torch.empty(width), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        return self.method.apply(self, x, self.bias)
