"""A mixture of experts against the form that computes every expert for every token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm_models.components.moe import MixtureOfExperts, Routing
from vllm_traits import ModelError

WIDTH, NUM_EXPERTS, NUM_CHOSEN = 8, 5, 2


class Counting(nn.Module):
    """An expert that remembers how many tokens it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.num_seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_seen += len(x)
        return x @ self.weight


def mixture(renormalize: bool, num_chosen: int = NUM_CHOSEN) -> MixtureOfExperts:
    torch.manual_seed(3)
    layer = MixtureOfExperts(WIDTH, Routing(NUM_EXPERTS, num_chosen, renormalize), Counting)
    nn.init.normal_(layer.gate.weight)
    return layer


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_only_the_chosen_experts_count_and_are_computed(num_tokens: int, renormalize: bool) -> None:
    layer = mixture(renormalize)
    x = torch.randn(num_tokens, WIDTH)
    got = layer(x)
    assert sum(expert.num_seen for expert in layer.experts) == num_tokens * NUM_CHOSEN
    scores = layer.gate(x).softmax(-1)
    best = scores.topk(NUM_CHOSEN).indices
    kept = torch.zeros_like(scores).scatter(1, best, scores.gather(1, best))
    if renormalize:
        kept /= kept.sum(-1, keepdim=True)
    every = torch.stack([expert(x) for expert in layer.experts], 1)  # [T, E, M]
    torch.testing.assert_close(got, (kept[..., None] * every).sum(1))


def test_a_tokens_answer_does_not_depend_on_its_neighbours() -> None:
    layer = mixture(renormalize=True)
    x = torch.randn(17, WIDTH)
    together = layer(x)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(together, alone)


def test_more_chosen_experts_than_there_are_is_an_error() -> None:
    with pytest.raises(ModelError, match="6 of 5 experts"):
        mixture(renormalize=True, num_chosen=6)
