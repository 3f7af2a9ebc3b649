"""The sampler's tokens, against those of the CPU's sampler.

Random numbers are the same bits everywhere; logarithms may round differently, so tokens are
compared where the best score leads by more than that.
"""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import sample as gpu
from vllm_models.runner import noise
from vllm_models.runner.edits import Target
from vllm_models.runner.rows import Row
from vllm_models.runner.sample import sample as cpu_sample
from vllm_traits import SamplingParams

MARGIN = 1e-5
GREEDY = SamplingParams(temperature=0.0)
NOISY = SamplingParams(temperature=1.0)
WARM = SamplingParams(temperature=1.7)
TOP_K = SamplingParams(temperature=0.7, top_k=20)
TOP_P = SamplingParams(temperature=0.9, top_p=0.8)
QWEN = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
MIN_P = SamplingParams(temperature=1.0, min_p=0.05)
MIX = [GREEDY, NOISY, TOP_K, WARM, TOP_P, QWEN, MIN_P, GREEDY]


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2


def seeds_of(number: int) -> list[int]:
    return [(0x9E3779B97F4A7C15 * (i + 1)) % (1 << 64) - (1 << 63) * (i % 2) for i in range(number)]


def lead(logits: torch.Tensor, p: SamplingParams, seed: int, position: int) -> float:
    """By how much the winner of an uncut row leads; a cut row's leads by no less."""
    if logits.numel() == 1:
        return torch.inf
    score = logits.float()
    if p.temperature > 0:
        ids = torch.arange(len(logits), dtype=torch.int32)[None]
        keys = noise.keys([(seed, position)], torch.device("cpu"))
        score = score / p.temperature - noise.exponential(keys, ids)[0].log()
    first, second = score.topk(2).values.tolist()
    return first - second


@pytest.fixture
def draw(device, sampling_state):
    """Samples on the device, from the state's rows in reverse order."""

    def draw_rows(logits, params, positions, seeds, **options) -> gpu.Winners:
        rows = torch.arange(len(params), dtype=torch.int32, device=device).flip(0)
        state = sampling_state(params[::-1], seeds[::-1])
        where = torch.tensor(positions, dtype=torch.int32, device=device)
        found = gpu.sample(logits.to(device), rows, where, state, **options)
        return gpu.Winners(found.token_ids.cpu(), found.scores.cpu())

    return draw_rows


def expected(logits, params, positions, seeds) -> list[int]:
    targets = [
        Target(i, Row(i, p, seed, 1, position), position)
        for i, (p, position, seed) in enumerate(zip(params, positions, seeds, strict=True))
    ]
    tokens = torch.zeros(len(params), 1, dtype=torch.int64)
    return cpu_sample(logits.float().clone(), targets, tokens, {}).token_ids


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [
        (1, torch.float32),
        (31, torch.bfloat16),
        (1000, torch.float32),
        (5000, torch.float32),
        (5000, torch.bfloat16),
    ],
)
def test_a_mix_of_rows_gets_the_tokens_of_the_cpu(draw, vocab_size, dtype) -> None:
    logits = random_logits(len(MIX), vocab_size).to(dtype)
    positions, seeds = [1, 7, 0, 40_000, 5, 99, 1023, 3], seeds_of(len(MIX))
    found = draw(logits, MIX, positions, seeds)
    wanted = expected(logits, MIX, positions, seeds)
    rows = zip(logits, MIX, seeds, positions, strict=True)
    clear = [p.temperature == 0 or lead(x, p, s, n) > MARGIN for x, p, s, n in rows]
    assert sum(clear) >= len(MIX) - 1
    assert [t for t, ok in zip(found.token_ids.tolist(), clear, strict=True) if ok] == [
        t for t, ok in zip(wanted, clear, strict=True) if ok
    ]


def test_scores_are_those_of_the_race(draw) -> None:
    logits, seeds, positions = random_logits(8, 300), seeds_of(8), list(range(8))
    found = draw(logits, [WARM] * 8, positions, seeds, truncated=False)
    keys = noise.keys(zip(seeds, positions, strict=True), torch.device("cpu"))
    times = noise.exponential(keys, torch.arange(300, dtype=torch.int32)[None])
    best = (logits / WARM.temperature - times.log()).max(-1)
    assert torch.allclose(found.scores, best.values, atol=2e-6)
    assert found.token_ids.tolist() == best.indices.tolist()


def test_the_first_of_equal_logits_wins_greedily(draw) -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [17, 4500]] = 1.0
    logits[2, [4096, 4999]] = 1.0
    found = draw(logits, [GREEDY] * 3, [1, 2, 3], [0] * 3)
    assert found.token_ids.tolist() == [0, 17, 4096]
    assert found.scores.tolist() == [0, 1, 1]


def test_a_row_without_a_possible_token_scores_minus_infinity(draw) -> None:
    logits = torch.full((3, 1000), -torch.inf)
    found = draw(logits, [GREEDY, NOISY, QWEN], [1, 2, 3], [0] * 3)
    assert found.scores.tolist() == [-torch.inf] * 3


def test_the_only_possible_token_is_sampled(draw) -> None:
    logits = torch.full((4, 5000), -torch.inf)
    logits[:, 4321] = -7.0
    found = draw(logits, [GREEDY, NOISY, QWEN, TOP_P], [1, 2, 3, 4], seeds_of(4))
    assert found.token_ids.tolist() == [4321] * 4
    assert bool(found.scores.isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_shows_in_the_score_of_its_row_alone(draw, value) -> None:
    params = [GREEDY, GREEDY, NOISY, NOISY, QWEN, QWEN, TOP_P, TOP_P]
    logits = random_logits(len(params), 5000)
    logits[::2, 4700] = value
    found = draw(logits, params, [3] * len(params), seeds_of(len(params)))
    assert not bool(found.scores[::2].isfinite().any())
    assert not bool((found.scores[::2] == -torch.inf).any())
    assert bool(found.scores[1::2].isfinite().all())


def test_a_token_is_the_same_alone_and_among_others(draw) -> None:
    logits, seeds = random_logits(len(MIX), 1000), seeds_of(len(MIX))
    together = draw(logits, MIX, [5] * len(MIX), seeds)
    for i, p in enumerate(MIX):
        alone = draw(logits[i : i + 1], [p], [5], seeds[i : i + 1])
        assert alone.token_ids.item() == together.token_ids[i].item()
        assert alone.scores.item() == together.scores[i].item()


def test_rows_of_a_wider_buffer_are_read_in_place(draw, device) -> None:
    buffer = random_logits(3, 700).to(device)
    found = draw(buffer[:, :500], [NOISY, GREEDY, QWEN], [1, 2, 3], seeds_of(3))
    whole = draw(buffer[:, :500].contiguous(), [NOISY, GREEDY, QWEN], [1, 2, 3], seeds_of(3))
    assert found.token_ids.tolist() == whole.token_ids.tolist()


def test_every_form_is_named_once() -> None:
    names = [variant.name for variant in gpu.variants()]
    assert len(names) == len(set(names)) > 0
