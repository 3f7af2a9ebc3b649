"""The experts of a mixture in one call: every row as its expert alone would compute it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm_models.native.blocks import PackedBlocks, pack_blocks, stack
from vllm_models.native.dense import PackedDense
from vllm_models.native.experts import PackedExperts, choose_experts, reference
from vllm_models.native.library import Library, load
from vllm_models.native.processor import InstructionSet, runnable

Make = Callable[[Library], list[PackedDense] | list[PackedBlocks]]
COUNTS = ([1, 0, 0, 1, 1], [0, 0, 0, 0, 4], [2, 3, 1, 0, 140], [0, 0, 0, 0, 0])


@pytest.fixture(params=runnable(), scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return load(InstructionSet(request.param))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(library: Library, dtype: torch.dtype = torch.bfloat16) -> list[PackedDense]:
    return [PackedDense(library, numbers(70, 64, seed=i).to(dtype)) for i in range(5)]


def single(library: Library) -> list[PackedDense]:
    return dense(library, torch.float32)


def stacked(library: Library) -> list[PackedBlocks]:
    """Each of two parts of different formats."""
    random = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(0, 60, (outputs, width), dtype=torch.uint8, generator=random)
        for _ in range(5)
        for outputs, width in ((70, 2 * 34), (33, 2 * 18))
    ]
    parts = [
        pack_blocks(library, blocks, kind, 64)
        for blocks, kind in zip(codes, ["Q8_0", "Q4_0"] * 5, strict=True)
    ]
    return [stack(parts[i : i + 2]) for i in range(0, 10, 2)]


@pytest.mark.parametrize("make", [dense, single, stacked])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_the_bits_of_its_own_expert(
    library: Library, make: Make, counts: list[int], dtype: torch.dtype
) -> None:
    weights = make(library)
    experts = PackedExperts(weights)
    starts = torch.tensor([0, *counts]).cumsum(0)
    x = numbers(sum(counts), 64).to(dtype)
    bias = numbers(5, experts.outputs, seed=9)
    want = reference(weights, x, starts)
    assert torch.equal(experts.matmul(x, starts), want)
    plain = [w.matmul(own, b) for w, own, b in zip(weights, x.split(counts), bias, strict=True)]
    assert torch.equal(experts.matmul(x, starts, bias=bias), torch.cat(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [dense, single, stacked])
def test_an_index_takes_rows_of_the_activations(
    library: Library, make: Make, dtype: torch.dtype
) -> None:
    weights = make(library)
    experts = PackedExperts(weights)
    x, index = numbers(3, 64).to(dtype), torch.tensor([2, 0, 0, 1, 2, 2])
    starts = torch.tensor([0, 1, 1, 4, 5, 6])
    assert torch.equal(experts.matmul(x, starts, index), experts.matmul(x[index], starts))


def test_the_experts_share_the_memory_of_their_weights(library: Library) -> None:
    weights = stacked(library)
    assert PackedExperts(weights).nbytes == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("is_sigmoid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "count"), [(1, 128, 8), (3, 5, 5), (700, 60, 4)])
def test_chosen_experts_and_weights_are_those_of_torch(
    library: Library,
    tokens: int,
    experts: int,
    count: int,
    dtype: torch.dtype,
    is_sigmoid: bool,
    renormalize: bool,
) -> None:
    logits = numbers(tokens, experts + 3)[:, :experts] * 2
    bias = numbers(experts, seed=1) if is_sigmoid else None
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
    best = (scores if bias is None else scores + bias).topk(count).indices
    expected = scores.gather(1, best)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    weights, chosen = choose_experts(library, logits, count, renormalize, 2.5, bias, dtype)
    assert torch.equal(chosen, best) and weights.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(weights.float(), expected * 2.5, rtol=tolerance, atol=1e-6)


def test_experts_are_different_ones_whatever_the_scores(library: Library) -> None:
    logits = torch.zeros(4, 6)
    logits[1, 2], logits[2], logits[3, :5] = torch.nan, torch.nan, -torch.inf
    _, chosen = choose_experts(library, logits, 4, True, 1.0, None, torch.float32)
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 6 for row in chosen.tolist())
    assert chosen[0].tolist() == [0, 1, 2, 3]
