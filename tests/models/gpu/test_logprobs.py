"""Log-probabilities, ranks and the most likely tokens."""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import logprobs
from vllm_models.runner.logprobs import describe, entries


def random_logits(rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 4


def check(logits: torch.Tensor, token_ids: list[int], num_top: int, device: torch.device) -> None:
    chosen = torch.tensor(token_ids, device=device)
    found = [x.cpu() for x in logprobs.score(logits.to(device), chosen, num_top)]
    wanted = logprobs.reference(logits, chosen.cpu(), num_top)
    assert found[1].tolist() == wanted[1].tolist()
    for one, other in ((found[0], wanted[0]), (found[3], wanted[3])):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=1e-5)
    assert torch.equal(logits.gather(1, found[2]), logits.gather(1, wanted[2]))


@pytest.mark.parametrize("vocab_size", [1, 31, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_the_reference(device, vocab_size, dtype) -> None:
    logits = random_logits(4, vocab_size).to(dtype)
    token_ids = [0, vocab_size - 1, vocab_size // 2, int(logits[3].float().argmin())]
    check(logits, token_ids, 5, device)


def test_entries_are_those_of_the_cpu(device) -> None:
    logits, token_ids, num_top = random_logits(3, 1000), [4, 999, 0], [0, 3, 20]
    chosen = torch.tensor(token_ids, device=device)
    scores = logprobs.score(logits.to(device), chosen, max(num_top))
    found = entries(token_ids, num_top, scores)
    for one, other in zip(found, describe(logits.log_softmax(-1), token_ids, num_top), strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


def test_equal_logits_share_a_rank(device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(3, 1)
    ranks = logprobs.score(logits.to(device), torch.tensor([2, 1, 3], device=device), 0)[1]
    assert ranks.tolist() == [1, 1, 3]


def test_impossible_tokens_have_no_probability(device) -> None:
    logits = random_logits(1, 9000)
    logits[0, 100:] = -torch.inf
    found = logprobs.score(logits.to(device), torch.tensor([8000], device=device), 2)
    assert found[0].item() == -torch.inf
    assert found[1].item() == 101
    kept = logits[:, :100].log_softmax(-1).topk(2)
    assert torch.allclose(found[3].cpu(), kept.values, atol=1e-5)
    assert found[2].tolist() == kept.indices.tolist()


def test_every_form_is_named_once() -> None:
    names = [variant.name for variant in logprobs.variants()]
    assert len(names) == len(set(names)) > 0
