"""Feed-forward layers of which each token uses a few: a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear
from vllm_models.gpu.launch import kernels_for
from vllm_models.native.experts import choose_experts
from vllm_models.native.library import library_for
from vllm_models.native.tape import as_one
from vllm_models.weights.saved import SavedTensor

_MAX_EXPERTS = 10_000
_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Routing:
    """How a token chooses its experts.

    Attributes:
        num_experts: How many there are.
        num_chosen: How many each token uses.
        renormalize: Scale the weights of the chosen ones to a sum of 1.
        is_sigmoid: Scores of experts do not depend on each other, and a learned correction is added
            to them for the choice alone; otherwise they are a softmax.
        num_groups: Experts are in groups of neighbours,
        num_chosen_groups: of which those whose two best are best are chosen first.
        scale: Multiplies the weights in the end.

    Raises:
        ModelError: More are to be chosen than there are, or there are more than in any model.
    """

    num_experts: int
    num_chosen: int
    renormalize: bool
    is_sigmoid: bool = False
    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_count(self.num_experts)
        if self.num_experts % self.num_groups or self.num_chosen_groups > self.num_groups:
            raise ModelError(
                f"{self.num_experts} experts cannot be in {self.num_groups} groups of which a "
                f"token chooses {self.num_chosen_groups}; correct n_group in config.json."
            )
        available = self.num_experts // self.num_groups * self.num_chosen_groups
        if self.num_chosen > available:
            raise ModelError(
                f"A token cannot choose {self.num_chosen} of {available} experts; correct "
                "num_experts_per_tok in config.json."
            )

    @property
    def chooses_freely(self) -> bool:
        """Whether groups leave no expert out."""
        return self.num_chosen_groups == self.num_groups


def check_count(num_experts: int) -> None:
    """Raise a ModelError before more experts are made than any model has."""
    if num_experts > _MAX_EXPERTS:
        raise ModelError(
            f"config.json says {num_experts} experts in a layer, but no model has more than "
            f"{_MAX_EXPERTS}."
        )


class MixtureOfExperts(nn.Module):
    """Every token goes to its best experts, and their answers are added by the router's weights.

    Args:
        width: Width of the model.
        routing: How many experts there are and which a token uses.
        expert: Makes one: [N, M] -> [N, M].
        shared: One more that every token uses, behind a gate of its own.
    """

    def __init__(
        self,
        width: int,
        routing: Routing,
        expert: Callable[[], nn.Module],
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.routing = routing
        self.gate = Linear(width, routing.num_experts)
        self.e_score_correction_bias = None
        if routing.is_sigmoid:  # what is this close to a tie needs float32
            self.gate.float()
            correction = torch.empty(routing.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(correction, requires_grad=False)
        self.experts = Experts(expert() for _ in range(routing.num_experts))
        self.shared_expert = shared
        self.shared_expert_gate = Linear(width, 1) if shared is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        out = self._routed(x)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            out = out + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return out

    def _routed(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        logits = self.gate(x if self.e_score_correction_bias is None else x.float())  # [T, E]
        how = (self.routing.num_chosen, self.routing.renormalize, self.routing.scale)
        bias, free = self.e_score_correction_bias, self.routing.chooses_freely
        if free and (gpu := kernels_for(x)) is not None:
            chosen = gpu.choose_experts(logits, *how, bias)
        elif free and (library := library_for(x)) is not None:
            chosen = choose_experts(library, logits, *how, bias, x.dtype)
        else:
            chosen = as_one(lambda: self._choose(logits, x.dtype))
        return self.experts(x, *chosen)

    def _choose(self, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weights, and which experts: [T, E] -> [T, num_chosen]."""
        if self.e_score_correction_bias is None:
            scores = choice = logits.float().softmax(-1)
        else:
            scores = logits.sigmoid()
            choice = scores + self.e_score_correction_bias
        if not self.routing.chooses_freely:
            choice = self._in_best_groups(choice)
        chosen = choice.topk(self.routing.num_chosen).indices
        weights = scores.gather(1, chosen)
        if self.routing.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return (weights * self.routing.scale).to(dtype), chosen

    def _in_best_groups(self, choice: Tensor) -> Tensor:
        """The scores [T, E], minus infinity outside of the chosen groups."""
        groups = choice.unflatten(-1, (self.routing.num_groups, -1))  # [T, G, E/G]
        best = groups.topk(min(2, groups.shape[-1])).values.sum(-1)  # [T, G]
        kept = best.topk(self.routing.num_chosen_groups).indices
        outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
        return groups.masked_fill(outside[..., None], -torch.inf).flatten(1)


def unstack(saved: SavedTensor) -> Iterable[SavedTensor]:
    """The experts of a stack [E, R, C], each in one or two shares of R; C may be blocks.

    Other tensors stay as they are.
    """
    path, _, name = saved.name.removesuffix(".weight").rpartition(".experts.")
    if name not in _STACKED:
        yield saved
        return
    num_experts, num_rows, columns = saved.shape
    parts = _STACKED[name]
    size = num_rows // len(parts)
    for expert in range(num_experts):
        for index, part in enumerate(parts):
            rows = slice(index * size, (index + 1) * size)
            yield saved.part(
                f"{path}.experts.{expert}.{part}.weight",
                (size, columns),
                lambda t, e=expert, r=rows: t.reshape(num_experts, num_rows, -1)[e, r],
            )
