"""The experts of a mixture: they are loaded one by one and compute together where they can.

Which experts a token uses is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vllm_models.components.expert_groups import ExpertGroup, find_group


class Experts(nn.ModuleList):
    """Experts that are held alike, or are not.

    Args:
        experts: Each [N, M] -> [N, M].
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self._group: ExpertGroup | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether kernels compute all experts at once; who was chosen stays on the device."""
        return self._group is not None

    def pack(self) -> None:
        """Find out whether kernels can compute all experts at once, after all were loaded."""
        self._group = find_group(self)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weighted sum of the answers of each token's experts: [T, M] -> [T, M].

        Args:
            x: [T, M].
            weights: [T, num_chosen].
            chosen: [T, num_chosen] which experts; all others compute nothing.
        """
        if self._group is not None:
            return self._group.compute(x, weights, chosen)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            answer = self[index](x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, answer.to(x.dtype))
        return out
