"""A request from start to end: prefix hits, lengths, seeds, and what is left of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_tools import INFO, ask, scheduler, step
from vllm_traits import FinishReason, PoolingParams, Request


def test_max_tokens_is_clipped_to_the_room_there_is() -> None:
    it = scheduler()
    it.add(ask("a", tuple([1] * 120), max_tokens=1000))
    while it.roster.sequences:
        step(it)
    assert it.stats.generation_tokens == 8
    assert it.stats.finished[FinishReason.LENGTH] == 1


def test_max_tokens_zero_computes_the_prompt_and_samples_nothing() -> None:
    it = scheduler()
    it.add(ask("a", 9, max_tokens=0))
    batch = step(it)
    assert batch is not None and not batch.chunks[0].sample
    (output,) = it.take_outputs()
    assert output.token_ids == () and output.finish_reason is FinishReason.LENGTH
    assert it.stats.prompt_tokens == 9 and not it.has_work()


def test_a_full_prefix_hit_still_computes_one_token() -> None:
    it = scheduler()
    for name in ("a", "b"):
        it.add(ask(name, 8, max_tokens=1))
        batch = step(it)
    assert batch is not None
    assert (batch.chunks[0].start, batch.chunks[0].num_tokens) == (4, 4)


def test_an_immediate_repeat_shows_as_many_cached_tokens_each_time() -> None:
    it = scheduler()
    shown = []
    for name in "abcd":
        it.add(ask(name, 17, max_tokens=1))
        step(it)
        shown.append(it.take_outputs()[-1].num_cached_tokens)
    assert shown == [0, 16, 16, 16]
    assert it.stats.prefix_cache_queries == 68 and it.stats.prefix_cache_hits == 48
    assert it.stats.prompt_tokens == 68 and it.stats.cached_prompt_tokens == 48


@pytest.mark.parametrize("field", ["salt", "adapter"])
def test_tenants_and_adapters_do_not_share_blocks(field: str) -> None:
    it = scheduler()
    values: dict[str, list[object]] = {"salt": [b"me", b"you"], "adapter": ["x", None]}
    for number, value in enumerate(values[field]):
        it.add(ask(str(number), 17, max_tokens=1, **{field: value}))
        step(it)
    assert it.stats.prefix_cache_hits == 0


@pytest.mark.parametrize("whole", [{"prompt_logprobs": 0}, {}])
def test_what_needs_every_position_uses_no_hit_but_publishes(whole: dict[str, int]) -> None:
    it = scheduler()
    params = (
        ask("a", 8, max_tokens=1, **whole)
        if whole
        else Request("a", tuple(range(1, 9)), PoolingParams())
    )
    it.add(ask("first", 8, max_tokens=1))
    step(it)
    it.add(params)
    batch = it.schedule()
    assert batch is not None and batch.chunks[0].num_tokens == 8
    assert it.stats.prefix_cache_queries == 8


def test_without_the_prefix_cache_nothing_is_published() -> None:
    it = scheduler(prefix_cache=False)
    for name in "ab":
        it.add(ask(name, 17, max_tokens=1))
        step(it)
    assert not it.cache.pool.block_of and it.stats.prefix_cache_queries == 0


def test_the_seed_is_always_set_and_the_users_if_given() -> None:
    it = scheduler()
    it.add(ask("a", seed=5))
    it.add(ask("b", (9,), seed=None))
    it.add(ask("c", (8,), seed=None))
    batch = it.schedule()
    assert batch is not None
    seeds = [start.seed for start in batch.starts]
    assert seeds[0] == 5 and seeds[1] != seeds[2]


def test_a_preempted_sequence_starts_again_with_its_completion_and_the_same_seed() -> None:
    it = scheduler(replace(INFO, num_blocks=4), watermark=0.0)
    it.add(ask("a", 7, max_tokens=9))
    it.add(ask("b", (9, *range(1, 7)), max_tokens=9, seed=None))
    starts = []
    released: list[int] = []
    while it.roster.sequences:
        batch = step(it)
        if batch is not None:
            starts += batch.starts
            released += batch.released
    again = [start for start in starts if start.seq_id == 1]
    assert len(again) == 2 and again[0].seed == again[1].seed
    assert len(again[1].token_ids) > len(again[0].token_ids) == again[1].num_prompt_tokens
    assert released.count(1) == 1


def test_nothing_is_kept_of_finished_requests() -> None:
    it = scheduler()
    for number in range(50):
        it.add(ask(str(number), (number + 1, 2, 3), max_tokens=1))
        step(it)
        it.take_outputs()
    assert not it.roster.sequences and not it.roster._unfinished and not it.has_work()
    assert len(it.roster.released) <= 1
