"""What is refused at the door, and by which number."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_tools import INFO, ask, run_until_preempted, scheduler, step
from vllm_traits import (
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    PoolingParams,
    QueueFullError,
    Request,
)


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextLengthError) as refused:
        scheduler().add(ask("a", tuple([1] * 128)))
    assert (refused.value.num_prompt_tokens, refused.value.max_model_len) == (128, 128)


def test_a_prompt_as_long_as_the_context_can_be_scored_or_embedded() -> None:
    it = scheduler()
    it.add(ask("a", tuple([1] * 128), max_tokens=0))
    it.add(Request("b", tuple([1] * 128), PoolingParams()))
    assert len(it.waiting) == 2


def test_a_prompt_larger_than_the_pool_is_refused_with_numbers() -> None:
    it = scheduler(replace(INFO, num_blocks=4))
    with pytest.raises(InvalidRequestError, match=r"17 tokens.*only 16"):
        it.add(ask("a", 17))


@pytest.mark.parametrize("token", [-1, 64, 1 << 40])
def test_a_token_outside_of_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        scheduler().add(ask("a", (1, token, 2)))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        scheduler().add(ask("a", ()))


def test_negative_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        scheduler().add(ask("a", max_tokens=-1))


def test_an_id_in_use_is_a_conflict_and_free_again_afterwards() -> None:
    it = scheduler()
    it.add(ask("a", max_tokens=1))
    with pytest.raises(InvalidRequestError) as refused:
        it.add(ask("a"))
    assert refused.value.code == "conflict"
    step(it)
    it.add(ask("a"))


def test_a_full_queue_refuses_and_counts_and_preempted_ones_do_not_fill_it() -> None:
    it = scheduler(replace(INFO, num_blocks=4), max_waiting=2, watermark=0.0)
    it.add(ask("a", 7, max_tokens=30))
    it.add(ask("b", (9, *range(1, 7)), max_tokens=30))
    with pytest.raises(QueueFullError):
        it.add(ask("c"))
    assert it.stats.rejected_queue_full == 1 and it.stats.received == 2
    run_until_preempted(it)
    it.add(ask("c"))
    it.add(ask("d"))
    with pytest.raises(QueueFullError):
        it.add(ask("e"))


def test_a_step_smaller_than_a_block_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="block"):
        scheduler(max_batch_tokens=3)


def test_host_drafts_beside_backend_drafts_are_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="drafts"):
        scheduler(replace(INFO, num_drafts=2), num_ngram_drafts=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "lifo"},
        {"max_waiting": 0},
        {"watermark": 1.0},
        {"max_preemptions": 0},
        {"num_ngram_drafts": -1},
        {"priority_ageing_s": 0},
        {"session_ttl_s": 0},
        {"max_session_share": 1.5},
        {"max_batch_tokens": -5},
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        scheduler(**wrong)
