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


@pytest.mark.parametrize("groups", [(2, 1), (5, 6)])
def test_groups_that_do_not_divide_the_experts_are_an_error(groups: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="n_group"):
        Routing(NUM_EXPERTS, 1, True, num_groups=groups[0], num_chosen_groups=groups[1])


def test_experts_of_the_best_groups_are_chosen_although_better_ones_are_outside() -> None:
    routing = Routing(4, 2, False, is_sigmoid=True, num_groups=2, num_chosen_groups=1, scale=3.0)
    layer = MixtureOfExperts(4, routing, Counting)
    for expert in layer.experts:
        expert.weight = nn.Parameter(torch.eye(4), requires_grad=False)
    layer.gate.weight.copy_(torch.eye(4))
    layer.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.5, 0.5]))
    x = torch.tensor([[2.0, -9.0, 1.0, 0.0]])  # the first expert is best, its group is not
    got = layer(x)
    assert [expert.num_seen for expert in layer.experts] == [0, 0, 1, 1]
    weights = torch.tensor([1.0, 0.0]).sigmoid().sum() * 3  # without the correction
    torch.testing.assert_close(got, x * weights)


def test_more_experts_than_any_model_has_are_refused_before_one_is_made() -> None:
    with pytest.raises(ModelError, match="100000000 experts in a layer"):
        Routing(10**8, 2, True)
