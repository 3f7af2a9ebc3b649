"""The kernel that samples, on every instruction-set class, against torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from vllm_models.native import choose as native
from vllm_models.native.choose import Draw
from vllm_models.native.library import Library, load
from vllm_models.native.processor import InstructionSet, runnable
from vllm_models.runner import noise
from vllm_models.runner.truncate import truncate

SIZES = (1, 15, 16, 513, 8192, 8193, 20_000)
CPU = torch.device("cpu")


@pytest.fixture(params=runnable(), scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return load(InstructionSet(request.param))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def choose(
    library: Library,
    logits: Tensor,
    temperatures: Tensor,
    keys: Tensor,
    cut: tuple[int, float, float] = (0, 1.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Scores and tokens as tensors."""
    top_k, top_p, min_p = cut
    draws = [
        Draw(temperature, top_p, min_p, tuple(key), top_k)
        for temperature, key in zip(temperatures.tolist(), keys.tolist(), strict=True)
    ]
    scores, tokens = native.choose(library, logits, draws)
    return torch.tensor(scores), torch.tensor(tokens)


def keys_of(count: int) -> Tensor:
    return noise.keys(((31 * i + 7, i) for i in range(count)), CPU)


def greedy(library: Library, logits: Tensor) -> tuple[Tensor, Tensor]:
    count = len(logits)
    no_keys = torch.zeros(count, 2, dtype=torch.int32)
    return choose(library, logits, torch.zeros(count), no_keys)


def race(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """Scores as torch computes them."""
    everyone = torch.arange(logits.shape[1], dtype=torch.int32)[None]
    return logits / temperatures[:, None] - noise.exponential(keys, everyone).log()


@pytest.mark.parametrize("size", SIZES)
def test_a_greedy_row_takes_its_largest_logit(library: Library, size: int) -> None:
    logits = numbers(5, size)
    scores, tokens = greedy(library, logits)
    best = logits.max(-1)
    assert torch.equal(scores, best.values) and torch.equal(tokens, best.indices)


@pytest.mark.parametrize("size", SIZES)
def test_a_race_has_the_winners_that_torch_finds(library: Library, size: int) -> None:
    logits, keys = numbers(20, size), keys_of(20)
    temperatures = torch.linspace(0.2, 2.0, 20)
    scores, tokens = choose(library, logits, temperatures, keys)
    best = race(logits, temperatures, keys).max(-1)
    assert torch.equal(tokens, best.indices)
    torch.testing.assert_close(scores, best.values, rtol=1e-6, atol=1e-6)


def test_times_of_arrival_are_those_of_the_noise_to_the_last_places(library: Library) -> None:
    """A logit that towers over the others shows the time of its own token."""
    size = 3000
    logits = torch.full((size, size), -torch.inf).fill_diagonal_(0.0)
    keys = keys_of(1).expand(size, 2).contiguous()
    scores, tokens = choose(library, logits, torch.ones(size), keys)
    assert torch.equal(tokens, torch.arange(size))
    times = noise.exponential(keys[:1], torch.arange(size, dtype=torch.int32)[None])[0]
    exact = -times.double().log()
    assert ((scores.double() - exact).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()


def test_rows_are_chosen_from_and_do_not_know_of_each_other(library: Library) -> None:
    logits, keys = numbers(6, 9000), keys_of(6)
    temperatures = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.0])
    whole = choose(library, logits, temperatures, keys)
    rows = torch.tensor([4, 1, 3])
    some = choose(library, logits[rows], temperatures[rows], keys[rows])
    assert all(torch.equal(part, one[rows]) for part, one in zip(some, whole, strict=True))
    wide = torch.cat([logits, logits], 1)[:, :9000]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            apart = choose(library, wide, temperatures, keys)
            assert all(torch.equal(a, b) for a, b in zip(apart, whole, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("places", [(3, 9, 8500), (0, 8191, 8192), (8999,)])
def test_the_first_of_equal_logits_wins(library: Library, places: tuple[int, ...]) -> None:
    logits = numbers(1, 9000).clamp(max=5)
    logits[0, list(places)] = 6
    assert greedy(library, logits)[1].item() == places[0]
    zeros = torch.full((1, 40), -1.0)
    zeros[0, 20], zeros[0, 21] = -0.0, 0.0
    assert greedy(library, zeros)[1].item() == 20


@pytest.mark.parametrize("place", [0, 17, 8200, 8999])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_is_not_a_number_is_told(
    library: Library, place: int, bad: float, temperature: float
) -> None:
    logits = numbers(2, 9000)
    logits[0, place] = bad
    given = (torch.full((2,), temperature), keys_of(2))
    scores, _ = choose(library, logits, *given)
    assert scores[0].isnan() if math.isnan(bad) else scores[0] == math.inf
    assert scores[1].isfinite()


def test_tokens_that_are_not_allowed_never_win(library: Library) -> None:
    logits = torch.full((2, 9000), -torch.inf)
    logits[0, 8700] = -50.0
    for temperature in (0.0, 1.0):
        given = (torch.full((2,), temperature), keys_of(2))
        scores, tokens = choose(library, logits, *given)
        assert tokens[0] == 8700
        assert scores[1] == -torch.inf


CUTS = {
    "top-k": (7, 1.0, 0.0),
    "top-k-1": (1, 1.0, 0.0),
    "top-k-of-all": (10_000_000, 1.0, 0.0),
    "top-k-beyond-what-is-near": (4000, 1.0, 0.0),
    "top-p": (0, 0.9, 0.0),
    "top-p-tiny": (0, 1e-6, 0.0),
    "top-p-almost-one": (0, 0.999999, 0.0),
    "min-p": (0, 1.0, 0.03),
    "min-p-1": (0, 1.0, 1.0),
    "min-p-tiny": (0, 1.0, 1e-30),
    "all": (50, 0.95, 0.02),
}


@pytest.mark.parametrize("size", [1, 17, 513, 20_000])
@pytest.mark.parametrize("spread", [0.01, 3.0, 40.0])
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_race_has_the_winners_that_torch_finds(
    library: Library, name: str, spread: float, size: int
) -> None:
    logits, keys, cut = numbers(24, size, seed=size) / 3 * spread, keys_of(24), CUTS[name]
    logits[::5, : size // 2] = -torch.inf
    temperatures = torch.linspace(0.3, 1.7, 24)
    scores, tokens = choose(library, logits, temperatures, keys, cut)
    top_k, top_p, min_p = (torch.full((24,), value) for value in cut)
    values, token_ids = truncate(logits / temperatures[:, None], top_k, top_p, min_p)
    raced = values - noise.exponential(keys, token_ids.int()).log()
    best = raced.max(-1)
    assert torch.equal(tokens, token_ids.gather(1, best.indices[:, None])[:, 0])
    torch.testing.assert_close(scores, best.values, rtol=1e-6, atol=1e-6)


def test_what_is_cut_does_not_depend_on_its_neighbours_or_threads(library: Library) -> None:
    logits, keys, cut = numbers(9, 9000), keys_of(9), (40, 0.8, 0.001)
    temperatures = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.0, 0.7, 0.7, 1.3])
    whole = choose(library, logits, temperatures, keys, cut)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (torch.arange(9), torch.tensor([4]), torch.tensor([8, 0, 1])):
                some = choose(library, logits[rows], temperatures[rows], keys[rows], cut)
                assert all(torch.equal(a, b[rows]) for a, b in zip(some, whole, strict=True))
    finally:
        torch.set_num_threads(before)


def test_equal_scores_stay_or_go_together(library: Library) -> None:
    """Of 500 equal ones behind the two best, top-k 3 keeps all: each wins sooner or later."""
    logits = torch.full((4000, 600), -9.0)
    logits[:, 50:550], logits[:, 7], logits[:, 599] = 0.0, 0.1, 0.1
    logits[:, 60] = -0.0
    _, tokens = choose(library, logits, torch.ones(4000), keys_of(4000), (3, 1.0, 0.0))
    found = set(tokens.tolist())
    assert {7, 599, 60} <= found <= {7, 599, *range(50, 550)} and len(found) > 480
    _, tokens = choose(library, logits, torch.ones(4000), keys_of(4000), (2, 1.0, 0.0))
    assert set(tokens.tolist()) == {7, 599}
