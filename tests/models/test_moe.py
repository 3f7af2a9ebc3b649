"""A mixture of experts against the form that computes every expert for every token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear
from vllm_models.components.moe import MixtureOfExperts, Routing
from vllm_models.kernels.clamped_swiglu import clamped_swiglu
from vllm_models.native.library import library
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


native = pytest.mark.skipif(library() is None, reason="there is no C compiler")
CHOSEN = {
    "one token": [[3, 1]],
    "nobody to the last": [[0, 1], [1, 3], [2, 0], [3, 2], [0, 3]],
    "all to two": [[2, 1], [1, 2], [2, 1]],
    "no token": [],
}


class Gated(nn.Module):
    """An expert with biases."""

    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.up = Linear(WIDTH, 2 * inner, bias=True)
        self.down = Linear(inner, WIDTH, bias=True)
        self.activate = partial(clamped_swiglu, alpha=1.7, limit=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activate(self.up(x)))


def loaded(dtype: torch.dtype, inner: int = 6) -> Experts:
    """As the loader leaves them."""
    torch.manual_seed(7)
    experts = Experts(Gated(inner) for _ in range(NUM_EXPERTS)).to(dtype)
    for layer in (layer for layer in experts.modules() if isinstance(layer, Linear)):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.method.pack(layer)
    experts.pack()
    return experts


def chosen_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights."""
    chosen = torch.tensor(CHOSEN[name], dtype=torch.int64).view(-1, NUM_CHOSEN)
    return chosen, torch.rand(chosen.shape, generator=torch.Generator().manual_seed(1))


@native
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_one_call_for_all_experts_gives_what_each_gives_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    experts = loaded(dtype)
    chosen, weights = chosen_of(name)
    x = torch.randn(len(chosen), WIDTH, dtype=dtype)
    one_by_one = torch.zeros(len(x), WIDTH)
    for token, choices in enumerate(chosen.tolist()):
        for place, index in enumerate(choices):
            one_by_one[token] += experts[index](x[token, None])[0].float() * weights[token, place]
    monkeypatch.setattr(Gated, "forward", None)  # nobody is asked alone
    got = experts(x, weights.to(dtype), chosen)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), one_by_one, atol=tolerance, rtol=tolerance)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_company_changes_no_bit_of_an_answer(dtype: torch.dtype) -> None:
    experts = loaded(dtype)
    random = torch.Generator().manual_seed(2)
    scores = torch.rand(150, NUM_EXPERTS, generator=random)
    scores[:, 0] += 1  # the first expert has more rows than a kernel takes at once
    weights, chosen = scores.topk(3)
    x = torch.randn(150, WIDTH, generator=random).to(dtype)
    together = experts(x, weights, chosen)
    for token in range(0, 150, 7):
        own = slice(token, token + 1)
        assert torch.equal(together[own], experts(x[own], weights[own], chosen[own]))


@native
def test_biases_of_experts_are_held_once() -> None:
    experts = loaded(torch.bfloat16)
    first, last = experts[0].down.bias, experts[NUM_EXPERTS - 1].down.bias
    size = WIDTH * first.element_size()
    assert last.data_ptr() == first.data_ptr() + (NUM_EXPERTS - 1) * size


def test_experts_that_differ_are_asked_one_by_one() -> None:
    experts = Experts([Gated(), Gated(10)])
    for layer in (layer for layer in experts.modules() if isinstance(layer, Linear)):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.method.pack(layer)
    experts.pack()
    x, weights = torch.randn(2, WIDTH), torch.tensor([[0.25, 0.5], [2.0, 1.0]])
    got = experts(x, weights, torch.tensor([[0, 1], [1, 0]]))
    small, large = experts[0](x), experts[1](x)
    by_expert = torch.stack((weights[0], weights[1].flip(0)))
    torch.testing.assert_close(got, small * by_expert[:, :1] + large * by_expert[:, 1:])


@native
def test_a_loaded_mixture_computes_all_experts_at_once(make_checkpoint: Any) -> None:
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    backend = make_checkpoint("qwen3_moe", **fields).load()
    found = [m for m in backend._runner.model.modules() if isinstance(m, Experts)]
    assert len(found) == 2 and all(experts.is_grouped for experts in found)
