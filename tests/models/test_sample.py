"""Sampling of a batch against the naive form of each parameter, one row at a time."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from vllm_models.runner import noise
from vllm_models.runner import sample as sampling
from vllm_models.runner.edits import Target, apply_edits, compile_edits
from vllm_models.runner.rows import Row
from vllm_models.runner.sample import NON_FINITE, NOTHING_ALLOWED, Sampled, sample
from vllm_models.runner.truncate import truncate
from vllm_traits import SamplingParams

VOCAB_SIZE = 200
EOS = frozenset({2})
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel where there is one, and as on other devices."""
    if request.param == "torch":
        monkeypatch.setattr(sampling, "library_for", lambda logits: None)


class Table:
    """Rows with random tokens, as a backend would hold them."""

    def __init__(self, params: list[SamplingParams], seed: int = 0) -> None:
        rng = random.Random(seed)
        self.tokens = torch.zeros(len(params), 64, dtype=torch.int64)
        self.history: list[list[int]] = []
        self.targets: list[Target] = []
        for index, p in enumerate(params):
            num_prompt, num_output = rng.randint(1, 20), rng.randint(0, 20)
            known = rng.choices(range(VOCAB_SIZE), k=num_prompt + num_output)
            self.history.append(known)
            self.tokens[index, : len(known)] = torch.tensor(known)
            edits = compile_edits(p, EOS, VOCAB_SIZE, CPU)
            row = Row(index, p, 1000 + index, num_prompt, len(known), edits=edits)
            self.targets.append(Target(index, row, len(known)))

    def sample(self, logits: torch.Tensor, masks: dict[int, bytes] | None = None) -> Sampled:
        return sample(logits.clone(), self.targets, self.tokens, masks or {})


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def naive_edits(
    logits: list[float], known: list[int], num_prompt: int, p: SamplingParams
) -> list[float]:
    """The documented order of operations, token by token."""
    out = list(logits)
    completion = known[num_prompt:]
    for token in range(VOCAB_SIZE):
        value = out[token]
        if p.allowed_token_ids is not None and token not in p.allowed_token_ids:
            value = -math.inf
        for bad in p.bad_token_ids:
            begins = list(bad[:-1])
            if bad[-1] == token and (not begins or known[-len(begins) :] == begins):
                value = -math.inf
        if len(completion) < p.min_tokens and token in EOS | p.stop_token_ids:
            value = -math.inf
        value += dict(p.logit_bias).get(token, 0.0)
        if token in known:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        count = completion.count(token)
        value -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
        out[token] = value
    return out


def naive_candidates(logits: list[float], p: SamplingParams) -> dict[int, float]:
    """Probability of every token that temperature, top-k, top-p and min-p leave."""
    scaled = {t: v / p.temperature for t, v in enumerate(logits) if v > -math.inf}
    order = sorted(scaled, key=lambda t: -scaled[t])[: p.top_k or None]
    best = scaled[order[0]]
    weights = {t: math.exp(scaled[t] - best) for t in order}
    total, passed, kept = sum(weights.values()), 0.0, []
    for token in order:
        if passed < p.top_p * total:
            kept.append(token)
        passed += weights[token]
    kept = [t for t in kept if weights[t] >= p.min_p]
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


EDITS = {
    "bias": {"logit_bias": ((3, 5.0), (150, -4.0))},
    "allowed": {"allowed_token_ids": (5, 6, 7, 100)},
    "bad-single": {"bad_token_ids": ((9,), (11,))},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.8},
    "repetition-below-one": {"repetition_penalty": 0.6},
    "min-tokens": {"min_tokens": 30, "stop_token_ids": frozenset({4, 8})},
    "min-tokens-reached": {"min_tokens": 1},
    "everything": {
        "logit_bias": ((3, 5.0),),
        "allowed_token_ids": tuple(range(0, 200, 3)),
        "bad_token_ids": ((9,),),
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "min_tokens": 10,
    },
    "nothing": {},
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_the_naive_form_and_touch_no_other_row(name: str) -> None:
    params = [SamplingParams(**EDITS[name]) if i % 2 else SamplingParams() for i in range(8)]
    table, logits = Table(params), random_logits(8)
    edited = logits.clone()
    apply_edits(edited, table.targets, table.tokens, {})
    for i, p in enumerate(params):
        row = table.targets[i].row
        wanted = naive_edits(logits[i].tolist(), table.history[i], row.num_prompt_tokens, p)
        torch.testing.assert_close(edited[i], torch.tensor(wanted))
    assert torch.equal(edited[::2], logits[::2])


def test_a_bad_sequence_is_forbidden_only_where_its_beginning_stands() -> None:
    params = SamplingParams(bad_token_ids=((7, 8, 9), (8, 20), (1, 2, 3, 4, 5, 6, 30), (40, 50)))
    table, logits = Table([params, params]), random_logits(2)
    for index, known in enumerate(([7, 8], [5, 40])):
        table.tokens[index, :2] = torch.tensor(known)
        table.targets[index] = table.targets[index]._replace(length=2)
        edited = logits.clone()
        apply_edits(edited, table.targets, table.tokens, {})
    forbidden = [set((row == -math.inf).nonzero().flatten().tolist()) for row in edited]
    assert forbidden == [{9, 20}, {50}]


def test_parameters_without_effect_on_logits_compile_to_nothing() -> None:
    params = SamplingParams(temperature=0.3, top_k=5, top_p=0.5, min_p=0.1, logprobs=3, seed=1)
    assert compile_edits(params, EOS, VOCAB_SIZE, CPU) is None


TRUNCATIONS = {
    "top-k": {"top_k": 7},
    "top-k-1": {"top_k": 1},
    "top-k-beyond-vocabulary": {"top_k": 10_000},
    "top-p": {"top_p": 0.8},
    "top-p-tiny": {"top_p": 1e-6},
    "top-p-almost-one": {"top_p": 0.9999, "temperature": 20.0},
    "min-p": {"min_p": 0.2},
    "min-p-1": {"min_p": 1.0},
    "all": {"top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    "hot": {"top_k": 150, "temperature": 5.0},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncation_keeps_the_naive_candidates(name: str) -> None:
    params = [SamplingParams(**TRUNCATIONS[name]), SamplingParams(top_k=3)]
    logits = random_logits(2)
    scaled = logits / torch.tensor([[p.temperature] for p in params])
    values, token_ids = truncate(
        scaled,
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params]),
        torch.tensor([p.min_p for p in params]),
    )
    for row, p in enumerate(params):
        kept = token_ids[row][values[row] > -math.inf].tolist()
        assert set(kept) == set(naive_candidates(logits[row].tolist(), p))


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, :2] = 1.0
    values, _ = truncate(logits, torch.tensor([5]), torch.ones(1), torch.zeros(1))
    assert int((values > -math.inf).sum()) == VOCAB_SIZE
    values, _ = truncate(logits, torch.tensor([1]), torch.ones(1), torch.zeros(1))
    assert int((values > -math.inf).sum()) == 2


def test_greedy_takes_the_largest_edited_logit() -> None:
    params = [SamplingParams(temperature=0.0, logit_bias=((i, 100.0),)) for i in range(4)]
    table = Table(params)
    assert table.sample(random_logits(4)).token_ids == [0, 1, 2, 3]


CHI_SQUARE = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(top_k=8),
    "top-p": SamplingParams(top_p=0.9),
    "min-p": SamplingParams(min_p=0.05),
    "edited": SamplingParams(presence_penalty=1.0, logit_bias=((5, 2.0),)),
}


@pytest.mark.parametrize("name", CHI_SQUARE)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_follow_the_softmax(name: str, vary: str) -> None:
    """Chi-square over 20,000 draws; the draws are fixed, so the test cannot flicker."""
    params, num_draws = CHI_SQUARE[name], 20_000
    table = Table([params])
    target, known = table.targets[0], table.history[0]
    logits = random_logits(1, seed=3)
    row = target.row
    counts: Counter[int] = Counter()
    if vary == "seed":
        for first in range(0, num_draws, 2000):
            rows = [
                Row(0, params, first + i, row.num_prompt_tokens, row.length, edits=row.edits)
                for i in range(2000)
            ]
            targets = [Target(i, r, target.length) for i, r in enumerate(rows)]
            drawn = sample(logits.repeat(2000, 1), targets, table.tokens, {})
            counts.update(drawn.token_ids)
    else:
        edited = torch.tensor(
            [naive_edits(logits[0].tolist(), known, row.num_prompt_tokens, params)]
        )
        bare = SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p)
        plain = Row(0, bare, 77, 1, 1)
        targets = [Target(i, plain, i) for i in range(num_draws)]
        counts.update(sample(edited.repeat(num_draws, 1), targets, table.tokens, {}).token_ids)
    logits_now = naive_edits(logits[0].tolist(), known, row.num_prompt_tokens, params)
    expected = naive_candidates(logits_now, params)
    assert counts.keys() <= expected.keys()
    common = {t: p for t, p in expected.items() if p * num_draws >= 5}
    rest = 1 - sum(common.values())
    bins = [(counts[t], p * num_draws) for t, p in common.items()]
    if rest * num_draws >= 5:
        bins.append((num_draws - sum(counts[t] for t in common), rest * num_draws))
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in bins)
    freedom = len(bins) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_noise_is_exponential_and_uncorrelated_between_neighbours() -> None:
    ids = torch.arange(4000, dtype=torch.int32)[None]
    draws = noise.exponential(noise.keys([(s, 5) for s in range(200)], CPU), ids)
    assert bool((draws > 0).all()) and bool(draws.isfinite().all())
    assert abs(float(draws.mean()) - 1) < 0.01
    assert abs(float(draws.var()) - 1) < 0.02
    uniform = (-draws).exp()
    for shifted in (uniform.roll(1, 0), uniform.roll(1, 1)):
        pairs = torch.stack((uniform.flatten(), shifted.flatten()))
        assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.005


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 2**80])
def test_every_seed_gives_its_own_noise(seed: int) -> None:
    ids = torch.arange(50, dtype=torch.int32)[None]
    keys = noise.keys([(seed, 3), (seed, 4), (seed + 1, 3)], CPU)
    first, second, third = noise.exponential(keys, ids)
    assert not torch.equal(first, second) and not torch.equal(first, third)


def random_params(rng: random.Random) -> SamplingParams:
    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.4 else default

    return SamplingParams(
        temperature=maybe(0.0, rng.uniform(0.3, 2)),
        top_k=maybe(rng.randint(1, 50), 0),
        top_p=maybe(rng.uniform(0.2, 1), 1.0),
        min_p=maybe(rng.uniform(0, 0.3), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe(((3, 4.0), (8, -2.0)), ()),
        allowed_token_ids=maybe(tuple(range(0, VOCAB_SIZE, 2)), None),
        bad_token_ids=maybe(((4,), (6, 8)), ()),
        min_tokens=maybe(15, 0),
        logprobs=maybe(3, None),
    )


def test_a_row_gets_the_same_token_alone_and_among_strangers() -> None:
    rng = random.Random(5)
    for round_ in range(20):
        params = [random_params(rng) for _ in range(12)]
        table, logits = Table(params, seed=round_), random_logits(12, seed=round_)
        together = table.sample(logits)
        for i, target in enumerate(table.targets):
            alone = sample(logits[i : i + 1].clone(), [target], table.tokens, {})
            assert alone.token_ids == together.token_ids[i : i + 1]
            assert alone.logprobs.get(0) == together.logprobs.get(i)


def test_logprobs_are_the_models_own_before_any_change() -> None:
    params = [
        SamplingParams(temperature=0.0, logprobs=n, allowed_token_ids=(17,), top_k=1)
        for n in (0, 3, VOCAB_SIZE)
    ]
    logits = random_logits(3)
    result = Table(params).sample(logits)
    wanted = logits.log_softmax(-1)
    for i, p in enumerate(params):
        entry = result.logprobs[i]
        assert entry.token_id == 17
        assert entry.logprob == pytest.approx(float(wanted[i, 17]), abs=1e-5)
        assert entry.rank == 1 + int((wanted[i] > wanted[i, 17]).sum())
        order = wanted[i].argsort(descending=True)[: p.logprobs].tolist()
        assert [token for token, _ in entry.top] == order


def test_a_mask_allows_exactly_its_bits() -> None:
    allowed = {0, 9, 150}
    mask = bytearray(VOCAB_SIZE // 8)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    table = Table([SamplingParams(), SamplingParams(temperature=0.0), SamplingParams()])
    for seed in range(20):
        drawn = table.sample(random_logits(3, seed), {0: bytes(mask), 1: bytes(mask)})
        assert set(drawn.token_ids[:2]) <= allowed


def test_ids_past_the_end_of_a_mask_are_forbidden() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 100] = 50.0
    drawn = Table([SamplingParams(temperature=0.0)]).sample(logits, {0: b"\x20"})
    assert drawn.token_ids == [5]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_row_that_cannot_be_sampled_fails_alone(temperature: float, cut: dict[str, Any]) -> None:
    params = SamplingParams(temperature=temperature, **cut)
    nothing = SamplingParams(
        temperature=temperature, allowed_token_ids=(3,), bad_token_ids=((3,),), **cut
    )
    logits = random_logits(4)
    wanted = Table([params] * 4).sample(logits).token_ids
    logits[0, 5] = math.nan
    logits[1, 5] = math.inf
    table = Table([params, params, params, nothing])
    result = table.sample(logits)
    assert result.failures == {0: NON_FINITE, 1: NON_FINITE, 3: NOTHING_ALLOWED}
    assert result.token_ids[2] == wanted[2]


def test_every_verified_position_counts_exactly_the_tokens_before_it() -> None:
    params = SamplingParams(
        presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.4, min_tokens=3
    )
    table = Table([params])
    (target,), known = table.targets, list(range(20, 40))
    table.tokens[0, :20] = torch.tensor(known)
    target.row.num_prompt_tokens = target.row.length = 15
    targets = [target._replace(length=15 + i) for i in range(6)]
    logits = random_logits(6)
    edited = logits.clone()
    apply_edits(edited, targets, table.tokens, {})
    for i in range(6):
        wanted = naive_edits(logits[i].tolist(), known[: 15 + i], 15, params)
        torch.testing.assert_close(edited[i], torch.tensor(wanted))
