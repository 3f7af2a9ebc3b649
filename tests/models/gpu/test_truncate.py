"""Thresholds of top-k, top-p and min-p, against the CPU's, which sorts."""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import truncate
from vllm_models.runner.truncate import truncate as sorted_truncate
from vllm_traits import SamplingParams

KINDS = {
    "top-k": SamplingParams(temperature=0.7, top_k=20),
    "large top-k": SamplingParams(temperature=1.3, top_k=700),
    "top-p": SamplingParams(temperature=1.0, top_p=0.9),
    "narrow top-p": SamplingParams(temperature=0.5, top_p=0.05),
    "both": SamplingParams(temperature=0.6, top_k=50, top_p=0.8),
    "min-p": SamplingParams(temperature=1.0, min_p=0.1),
    "all": SamplingParams(temperature=1.1, top_k=300, top_p=0.97, min_p=0.01),
    "one": SamplingParams(temperature=1.0, top_k=1),
    "wide top-k": SamplingParams(temperature=1.0, top_k=1 << 20, top_p=0.5),
}


def kept_by_sorting(logits: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """Which tokens [V] the CPU keeps."""
    scaled = logits.float().cpu()[None] / p.temperature
    columns = (torch.tensor([p.top_k]), torch.tensor([p.top_p]), torch.tensor([p.min_p]))
    candidates = sorted_truncate(scaled, *columns)
    kept = torch.zeros(scaled.shape[1], dtype=torch.bool)
    kept[candidates.token_ids[0][candidates.logits[0] > -torch.inf]] = True
    return kept


@pytest.fixture
def check(device, sampling_state):
    """Compares what remains possible in every row."""

    def compare(logits: torch.Tensor, params: list[SamplingParams]) -> None:
        rows = torch.arange(len(params), dtype=torch.int32, device=device).flip(0)
        state = sampling_state(params[::-1], [0] * len(params))
        found = truncate.find_thresholds(logits.to(device), rows, state).cpu()
        for row, p, threshold in zip(logits, params, found, strict=True):
            if p.top_k >= len(row) and p.top_p == 1 and p.min_p == 0:
                continue  # keeps all, so nobody reads the threshold
            possible = (row >= threshold) & (row > -torch.inf)
            assert possible.tolist() == kept_by_sorting(row, p).tolist(), p

    return compare


def random_logits(rows: int, vocab_size: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab_size", [2, 31, 5000])
def test_the_same_tokens_remain_as_by_sorting(check, vocab_size) -> None:
    check(random_logits(len(KINDS), vocab_size), list(KINDS.values()))


@pytest.mark.parametrize("kind", ["top-p", "both"])
def test_peaked_and_flat_rows_keep_what_sorting_keeps(check, kind) -> None:
    logits = random_logits(3, 5000)
    logits[0, 77] = 60.0
    logits[1] *= 1e-3
    logits[2, :4000] = -torch.inf
    check(logits, [KINDS[kind]] * 3)


def test_equal_logits_stay_or_go_together(check) -> None:
    logits = random_logits(4, 1000).round()
    logits[3] = 1.5
    check(logits, [KINDS[kind] for kind in ("top-k", "top-p", "both", "both")])


def test_bfloat16_logits_are_cut_where_their_values_are_cut(check) -> None:
    check(random_logits(len(KINDS), 300).bfloat16(), list(KINDS.values()))


def test_a_row_with_more_equal_logits_than_are_collected_is_bisected_itself(check) -> None:
    logits = torch.full((3, 5000), -1.0)
    logits[:, 4990:] = 2.0
    check(logits, [KINDS["top-p"], KINDS["top-k"], SamplingParams(top_k=40, top_p=0.99)])


def test_logits_far_below_the_best_are_still_counted(check) -> None:
    logits = random_logits(2, 1000)
    logits[:, 5:] -= 1e9
    logits[1, 100:] = -3e38
    check(logits, [KINDS["top-k"], SamplingParams(temperature=2.0, top_k=99)])


def test_fewer_possible_tokens_than_top_k_all_stay(check) -> None:
    logits = random_logits(2, 100)
    logits[:, 10:] = -torch.inf
    check(logits, [KINDS["top-k"], SamplingParams(top_k=20, top_p=0.7)])


def test_a_row_is_cut_alike_alone_and_among_others(device, sampling_state) -> None:
    logits, params = random_logits(4, 5000).to(device), [KINDS["top-p"]] * 4
    rows = torch.arange(4, dtype=torch.int32, device=device)
    state = sampling_state(params, [0] * 4)
    together = truncate.find_thresholds(logits, rows, state)
    alone = truncate.find_thresholds(logits[2:3], rows[2:3], state)
    assert together[2].item() == alone[0].item()


def test_every_form_is_named_once() -> None:
    names = [variant.name for variant in truncate.variants()]
    assert len(names) == len(set(names)) > 0
