"""Mixtures of experts: who is chosen, in which order pairs stand, and what experts answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear
from vllm_models.components.moe import MixtureOfExperts, Routing
from vllm_models.gguf.types import GgmlType
from vllm_models.gpu import moe_answers, moe_columns, moe_matmul, moe_routing
from vllm_models.gpu.layout import numbers_of
from vllm_models.gpu.moe_matmul import expert_matmul, plan_pairs
from vllm_models.gpu.stacked import StackedExperts, stack_experts
from vllm_models.kernels.silu_mul import silu_mul
from vllm_models.quantization.blocks import Blocks
from vllm_models.quantization.on_gpu import (
    GpuWeight,
    fp8_planes,
    grouped_planes,
    keep_on_gpu,
)

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def some_chosen(num_tokens: int, num_experts: int, num_chosen: int) -> Tensor:
    """Different experts for each token; the last is nobody's."""
    last = max(num_chosen, num_experts - 1)
    return numbers(num_tokens, num_experts)[:, :last].topk(num_chosen).indices.int()


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds neither numbers nor places."""

    def poisoned(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return torch.full(size, torch.nan if dtype.is_floating_point else 119, dtype=dtype)

    if not torch.cuda.is_available():  # where nobody may read what is not there
        monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(4, 1), (5, 5), (60, 4), (128, 8)])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_the_best_experts_are_chosen(
    device: torch.device, num_experts: int, num_chosen: int, renormalize: bool, is_sigmoid: bool
) -> None:
    logits = numbers(7, 2 * num_experts)[:, :num_experts].to(device)
    correction = numbers(num_experts, seed=3).to(device) if is_sigmoid else None
    arguments = (logits, num_chosen, renormalize, 1.5, correction)
    weights, chosen = moe_routing.choose_experts(*arguments)
    wanted, experts = moe_routing.reference(*arguments)
    assert torch.equal(chosen, experts)
    torch.testing.assert_close(weights, wanted)


def test_a_tie_goes_to_the_first_and_what_is_no_number_to_somebody(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [torch.nan] * 3, [-torch.inf, 0.0, -torch.inf]])
    with np.errstate(invalid="ignore"):
        weights, chosen = moe_routing.choose_experts(logits.to(device), 2, renormalize=True)
    assert chosen[0].tolist() == [1, 2] and chosen[2].tolist()[0] == 1
    assert bool(((chosen >= 0) & (chosen < 3)).all())
    assert weights[1].isnan().all() and weights[2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_chosen"), [(1, 4, 1), (9, 5, 3), (130, 60, 8), (3, 128, 8)]
)
def test_pairs_stand_by_expert_and_in_their_order(
    device: torch.device, num_tokens: int, num_experts: int, num_chosen: int, block_size: int
) -> None:
    chosen = some_chosen(num_tokens, num_experts, num_chosen)
    found = moe_routing.sort_pairs(chosen.to(device), num_experts, block_size)
    wanted = moe_routing.reference_places(chosen, num_experts, block_size)
    count = int(wanted.num_blocks)
    assert int(found.num_blocks) == count <= len(found.experts)
    assert torch.equal(found.experts[:count].cpu(), wanted.experts)
    assert torch.equal(found.pairs[: count * block_size].cpu(), wanted.pairs)


def test_memory_is_enough_where_every_expert_has_one_pair(device: torch.device) -> None:
    chosen = torch.arange(60, dtype=torch.int32, device=device).view(10, 6)
    found = moe_routing.sort_pairs(chosen, 60, 16)
    assert int(found.num_blocks) == 60 == len(found.experts)


FORMS = {"pairs": None, "small": moe_matmul.Form(16, 64), "fixed": moe_matmul.FIXED}
SHAPES = [(1, 4, 1, 20, 33), (5, 9, 3, 70, 80), (20, 6, 2, 16, 130)]  # T, E, k, N, K


def plan(chosen: Tensor, num_experts: int, form: moe_matmul.Form | None) -> moe_matmul.Plan:
    if form is None:
        return moe_matmul.Plan(chosen, None, None)
    places = moe_routing.sort_pairs(chosen, num_experts, form.block_m)
    return moe_matmul.Plan(chosen, form, places)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMS)
def test_every_pair_is_multiplied_by_its_expert(
    device: torch.device, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    num_tokens, num_experts, num_chosen, rows, columns = shape
    chosen = some_chosen(num_tokens, num_experts, num_chosen).to(device)
    weight = numbers(num_experts, rows, columns).to(device, dtype)
    bias = numbers(num_experts, rows).to(device)
    stacked = StackedExperts(rows, columns, weight)
    found = plan(chosen, num_experts, FORMS[name])
    for x, own_bias in (
        (numbers(num_tokens, columns).to(device, dtype), bias),
        (numbers(num_tokens * num_chosen, columns).to(device, dtype), None),
    ):
        got = expert_matmul(x, [stacked], found, own_bias)
        wanted = moe_matmul.reference(x, weight, chosen, own_bias)
        assert got.dtype == dtype
        tolerance = {"atol": TOLERANCE[dtype] * columns**0.5, "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(got.float(), wanted.float(), **tolerance)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts_are_multiplied_as_the_numbers_they_stand_for(
    device: torch.device, bits: int, name: str
) -> None:
    num_experts, columns, group = 5, 96, 32
    random = torch.Generator().manual_seed(0)
    made, weights = [], []
    for rows in (16, 12):  # neighbours of one layer
        shape = (num_experts, rows)
        codes = torch.randint(0, 1 << bits, (*shape, columns), dtype=torch.uint8, generator=random)
        scales = torch.rand(*shape, columns // group, generator=random)
        zeros = codes[..., ::group].contiguous()
        planes = [
            grouped_planes(*(t.to(device) for t in own), bits=bits, group_size=group)
            for own in zip(codes, scales, zeros, strict=True)
        ]
        stacked = stack_experts(planes, first=sum(w.shape[1] for w in weights))
        assert stacked is not None
        made.append(stacked[0])
        weights.append(torch.stack([numbers_of(own) for own in planes]))
        assert all(
            torch.equal(numbers_of(a), numbers_of(b))
            for a, b in zip(planes, stacked[1], strict=True)
        )
    chosen = some_chosen(3, num_experts, 2).to(device)
    x, bias = numbers(3, columns).to(device), numbers(num_experts, 28).to(device)
    got = expert_matmul(x, made, plan(chosen, num_experts, FORMS[name]), bias)
    wanted = moe_matmul.reference(x, torch.cat(weights, 1), chosen, bias)
    torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", ["pairs", "small"])
def test_experts_in_floats_of_8_bits(device: torch.device, name: str) -> None:
    weight = numbers(3, 16, 40).to(device)
    scales = torch.rand(3, 16, 1, generator=torch.Generator().manual_seed(0)).to(device)
    codes = weight.to(torch.float8_e4m3fn)
    stacked = stack_experts([fp8_planes(*own, None) for own in zip(codes, scales, strict=True)])
    assert stacked is not None
    chosen, x = some_chosen(3, 3, 1).to(device), numbers(3, 40).to(device)
    got = expert_matmul(x, [stacked[0]], plan(chosen, 3, FORMS[name]))
    wanted = moe_matmul.reference(x, codes.float() * scales, chosen)
    torch.testing.assert_close(got, wanted, atol=1e-2, rtol=1e-3)


def test_planes_of_different_formats_are_not_stacked(device: torch.device) -> None:
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8, device=device), torch.ones(4, 2)
    four = grouped_planes(codes, scales.to(device), bits=4, group_size=32)
    eight = grouped_planes(codes, scales.to(device), bits=8, group_size=32)
    assert stack_experts([four, eight]) is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_tokens", "num_chosen", "width"), [(1, 8, 1100), (5, 1, 3)])
def test_answers_are_added_by_their_weights(
    device: torch.device, num_tokens: int, num_chosen: int, width: int, dtype: torch.dtype
) -> None:
    answers = numbers(num_tokens * num_chosen, width).to(device, dtype)
    weights = numbers(num_tokens, num_chosen).to(device)
    got = moe_answers.add_answers(answers, weights)
    wanted = moe_answers.reference(answers, weights)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted, atol=tolerance, rtol=tolerance)


def test_in_a_fixed_order_company_changes_no_bit(device: torch.device) -> None:
    chosen = some_chosen(40, 6, 2).to(device)
    x, weight = numbers(40, 100).to(device), numbers(6, 20, 100).to(device)
    stacked = [StackedExperts(20, 100, weight)]
    together = expert_matmul(x, stacked, plan_pairs(chosen, 6, x.dtype, fixed_order=True))
    for token in (0, 17, 39):
        own = plan_pairs(chosen[token : token + 1], 6, x.dtype, fixed_order=True)
        alone = expert_matmul(x[token : token + 1], stacked, own)
        assert torch.equal(alone, together[2 * token : 2 * token + 2])


def test_many_pairs_are_sorted_and_few_are_not(device: torch.device) -> None:
    few = plan_pairs(some_chosen(8, 60, 8).to(device), 60, torch.bfloat16)
    many = plan_pairs(some_chosen(9, 60, 8).to(device), 60, torch.bfloat16)
    assert few.places is None and many.places is not None


WIDTH, INNER = 32, 32
KINDS = {
    "plain": None,
    "blocks": ({"gate": GgmlType.MXFP4, "up": GgmlType.MXFP4}, {"": GgmlType.Q8_0}),
    "two formats": ({"gate": GgmlType.Q8_0, "up": GgmlType.Q4_0}, {"": GgmlType.MXFP4}),
}
HEADS = {GgmlType.MXFP4: [124], GgmlType.Q8_0: [0, 20], GgmlType.Q4_0: [0, 36]}  # scales


class Expert(nn.Module):
    """With biases."""

    def __init__(self, kinds: Any) -> None:
        super().__init__()
        self.gate_up = Linear(WIDTH, {"gate": INNER, "up": INNER}, bias=True)
        self.down = Linear(INNER, WIDTH, bias=True)
        self.activate = silu_mul
        for layer, own in zip((self.gate_up, self.down), kinds or (), strict=False):
            layer.use(Blocks(own))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activate(self.gate_up(x)))


def fill(layer: Linear) -> None:
    """With random numbers or blocks, as the loader does."""
    nn.init.normal_(layer.bias)
    if not isinstance(layer.method, Blocks):
        nn.init.normal_(layer.weight, std=0.1)
    else:
        for name, kind, _ in layer.method.stacks(layer):
            bytes_of = {GgmlType.MXFP4: 17, GgmlType.Q8_0: 34, GgmlType.Q4_0: 18}[kind]
            blocks = getattr(layer, name).unflatten(-1, (-1, bytes_of))
            blocks.random_(0, 256)
            blocks[..., : len(HEADS[kind])] = torch.tensor(HEADS[kind], dtype=torch.uint8)
    layer.method.pack(layer)


def make_experts(kind: str, count: int = 5) -> Experts:
    torch.manual_seed(1)
    experts = Experts(Expert(KINDS[kind]) for _ in range(count))
    for layer in (layer for layer in experts.modules() if isinstance(layer, Linear)):
        fill(layer)
    return experts


def ask_each(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """What the experts answer, asked one by one."""
    found = torch.zeros_like(x)
    for token, choices in enumerate(chosen.tolist()):
        for place, index in enumerate(choices):
            found[token] += experts[index](x[token, None])[0] * weights[token, place]
    return found


@pytest.mark.parametrize(
    ("kind", "fixed_order"),
    [("plain", False), ("plain", True), ("blocks", False), ("two formats", True)],
)
def test_experts_at_once_answer_what_each_answers_alone(
    on_gpu: None, kind: str, fixed_order: bool
) -> None:
    experts = make_experts(kind)
    x, chosen = numbers(2, WIDTH).to(experts[0].down.bias.device), some_chosen(2, 5, 2)
    chosen, weights = chosen.to(x.device), numbers(2, 2).to(x.device)
    wanted = ask_each(experts, x, weights, chosen)
    num_bytes = sum(parameter.nbytes for parameter in experts.parameters())
    experts.pack()
    assert experts.is_grouped
    for layer in (layer for layer in experts.modules() if isinstance(layer, Linear)):
        layer.fixed_order = fixed_order
    torch.testing.assert_close(experts(x, weights, chosen), wanted, atol=2e-2, rtol=2e-2)
    assert sum(parameter.nbytes for parameter in experts.parameters()) == num_bytes
    alone = experts[chosen[0, 0]](x[:1])  # still there, in the memory of all
    assert bool(alone.isfinite().all())
    memory = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    assert len(memory) <= len(list(experts.parameters())) / len(experts)


@pytest.mark.parametrize(("num_tokens", "fixed_order"), [(1, False), (3, True)])
def test_experts_of_different_formats_answer_at_once(
    on_gpu: None, num_tokens: int, fixed_order: bool
) -> None:
    first, second, third = (make_experts(kind, 2) for kind in ("blocks", "plain", "two formats"))
    experts = Experts([first[0], second[0], third[0], second[1], first[1], third[1]])
    device = experts[0].down.bias.device
    chosen = some_chosen(num_tokens, 6, 3).to(device)
    x, weights = numbers(num_tokens, WIDTH).to(device), numbers(num_tokens, 3).to(device)
    wanted = ask_each(experts, x, weights, chosen)
    experts.pack()
    assert experts.is_grouped
    for layer in (layer for layer in experts.modules() if isinstance(layer, Linear)):
        layer.fixed_order = fixed_order
    got = experts(x, weights, chosen)
    torch.testing.assert_close(got, wanted, atol=2e-2, rtol=2e-2)
    if fixed_order:
        assert torch.equal(experts(x[:1], weights[:1], chosen[:1]), got[:1])


def test_experts_with_an_order_of_columns_answer_at_once(on_gpu: None) -> None:
    experts = make_experts("blocks", 3)
    for own in (experts[0], experts[2]):
        for layer in (own.gate_up, own.down):
            order = torch.randperm(layer.in_features).to(layer.bias.device)
            assert isinstance(layer.packed, GpuWeight)
            segments = [segment._replace(order=order) for segment in layer.packed.segments]
            keep_on_gpu(layer, segments, ())
    device = experts[0].down.bias.device
    chosen = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32, device=device)
    x, weights = numbers(2, WIDTH).to(device), numbers(2, 2).to(device)
    wanted = ask_each(experts, x, weights, chosen)
    experts.pack()
    assert experts.is_grouped
    torch.testing.assert_close(experts(x, weights, chosen), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("rows", "num_chosen", "columns"), [(3, 2, 33), (8, 1, 16), (1, 5, 2050)])
def test_columns_stand_in_the_order_of_the_expert(
    device: torch.device, rows: int, num_chosen: int, columns: int
) -> None:
    x, chosen = numbers(rows, columns).to(device), some_chosen(rows, 6, num_chosen).to(device)
    orders = torch.stack([torch.randperm(columns) for _ in range(6)]).int().to(device)
    got = moe_columns.order_columns(x, chosen, orders)
    assert torch.equal(got, moe_columns.reference(x, chosen, orders))


def test_pairs_of_no_expert_are_left_out(device: torch.device) -> None:
    x, weight = numbers(3, 20).to(device), numbers(2, 7, 20).to(device)
    chosen = torch.tensor([[0, -1], [-1, 1], [-1, -1]], dtype=torch.int32, device=device)
    out = torch.full((6, 7), 5.0, device=device)
    own = plan_pairs(chosen, 2, x.dtype, is_partial=True)
    expert_matmul(x, [StackedExperts(7, 20, weight)], own, out=out)
    wanted = torch.full((6, 7), 5.0, device=device)
    wanted[0], wanted[3] = weight[0] @ x[0], weight[1] @ x[1]
    torch.testing.assert_close(out, wanted)


class Strange(nn.Module):
    """Not two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Linear(WIDTH, WIDTH)
        self.activate = silu_mul


def test_experts_that_are_not_two_layers_are_asked_one_by_one(on_gpu: None) -> None:
    experts = Experts([Strange(), Strange()])
    experts.pack()
    assert not experts.is_grouped


@pytest.mark.parametrize("is_sigmoid", [False, True])
def test_a_mixture_routes_on_the_device(on_gpu: None, is_sigmoid: bool) -> None:
    """As the same layer in plain torch."""
    routing = Routing(5, 2, renormalize=True, is_sigmoid=is_sigmoid, scale=2.0)
    layer = MixtureOfExperts(WIDTH, routing, lambda: Expert(None))
    for own in (own for own in layer.modules() if isinstance(own, Linear) and own.bias is not None):
        fill(own)
    nn.init.normal_(layer.gate.weight)
    if is_sigmoid:
        nn.init.normal_(layer.e_score_correction_bias)
    x = numbers(3, WIDTH).to(layer.gate.weight.device)
    weights, chosen = layer._choose(layer.gate(x), torch.float32)
    wanted = layer.experts(x, weights, chosen)
    layer.experts.pack()
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)
