"""Feed-forward layers of which each token uses a few: a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.linear import Linear


class MixtureOfExperts(nn.Module):
    """Every token goes to its best experts, and their answers are added by the router's weights.

    Args:
        width: Width of the model.
        num_experts: How many there are.
        num_chosen: How many each token uses.
        renormalize: Scale the weights of the chosen ones to a sum of 1.
        expert: Makes one: [N, M] -> [N, M].
        shared: One more that every token uses, behind a gate of its own.

    Raises:
        ModelError: More are to be chosen than there are.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        num_chosen: int,
        renormalize: bool,
        expert: Callable[[], nn.Module],
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_chosen > num_experts:
            raise ModelError(
                f"A token cannot choose {num_chosen} of {num_experts} experts; correct "
                "num_experts_per_tok in config.json."
            )
        self.num_chosen = num_chosen
        self.renormalize = renormalize
        self.gate = Linear(width, num_experts)
        self.experts = nn.ModuleList(expert() for _ in range(num_experts))
        self.shared_expert = shared
        self.shared_expert_gate = Linear(width, 1) if shared is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        out = self._routed(x)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return out

    def _routed(self, x: Tensor) -> Tensor:
        """Only experts that some token chose are computed, each once: [T, M] -> [T, M]."""
        scores = self.gate(x).float().softmax(-1)  # [T, E]
        weights, chosen = scores.topk(self.num_chosen)  # [T, num_chosen]
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            answer = self.experts[index](x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, answer)
        return out
