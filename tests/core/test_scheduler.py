"""What a step contains, who gets in, and who gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_tools import INFO, Clock, answer, ask, names, scheduler, step
from vllm_traits import (
    ConfigError,
    ContextLengthError,
    FinishReason,
    InvalidRequestError,
    PoolingParams,
    QueueFullError,
    Request,
)


def test_decodes_come_first_and_a_prompt_fills_the_rest_in_chunks_on_the_grid() -> None:
    it = scheduler(max_batch_tokens=11)
    it.add(ask("a", 5))
    step(it)
    it.add(ask("b", (9, *range(1, 20))))
    batch = it.schedule()
    assert batch is not None
    decode, prompt = batch.chunks
    assert (decode.num_tokens, decode.sample) == (1, True)
    assert (prompt.start, prompt.num_tokens, prompt.sample) == (0, 8, False)
    it.update(answer(batch))
    batch = it.schedule()
    assert batch is not None
    assert (batch.chunks[1].start, batch.chunks[1].num_tokens) == (8, 8)
    assert it.stats.mixed_steps == 2


def test_decodes_that_use_up_the_budget_do_not_starve_a_prompt() -> None:
    it = scheduler(max_batch_tokens=6, max_sequences=8)
    for number in range(6):
        it.add(ask(str(number), 1, max_tokens=100))
        step(it)
    it.add(ask("late", (9, 9, 9), max_tokens=100))
    seen = set[str]()
    for _ in range(3):
        batch = it.schedule()
        seen |= set(names(it, batch))
        assert batch is not None
        it.update(answer(batch))
    assert seen == {"0", "1", "2", "3", "4", "5", "late"}


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_a_budget_below_the_number_of_decodes_is_shared_in_turn(overlap_depth: int) -> None:
    clock = Clock()
    it = scheduler(clock=clock, max_batch_tokens=4, max_sequences=8)
    for number in range(8):
        it.add(ask(str(number), 1, max_tokens=1000))
    told: dict[str, int] = {}
    in_flight = []
    for _ in range(60):
        clock.now += 1.0
        batch = it.schedule()
        for name in names(it, batch):
            told[name] = told.get(name, 0) + 1
        if batch is not None:
            in_flight.append(batch)
        if len(in_flight) == overlap_depth:
            it.update(answer(in_flight.pop(0)))
    assert len(told) == 8 and min(told.values()) >= max(told.values()) // 2


def test_fcfs_admits_in_order_of_arrival() -> None:
    it = scheduler(max_sequences=1)
    for name in "abc":
        it.add(ask(name, max_tokens=1))
    assert [names_of_next(it) for _ in range(3)] == [["a"], ["b"], ["c"]]


def names_of_next(it: object) -> list[str]:
    batch = it.schedule()  # type: ignore[attr-defined]
    found = names(it, batch)  # type: ignore[arg-type]
    it.update(answer(batch))  # type: ignore[attr-defined]
    return found


def test_priority_admits_the_lowest_first() -> None:
    it = scheduler(policy="priority", max_sequences=1)
    for name, priority in (("low", 5), ("high", -1), ("mid", 0)):
        it.add(ask(name, max_tokens=1, priority=priority))
    assert [names_of_next(it) for _ in range(3)] == [["high"], ["mid"], ["low"]]


def test_priority_ages_so_that_nobody_waits_for_ever() -> None:
    clock = Clock()
    it = scheduler(clock=clock, policy="priority", max_sequences=1, priority_ageing_s=10)
    it.add(ask("old", max_tokens=1, priority=3))
    clock.now = 31.0
    it.add(ask("new", max_tokens=1, priority=0))
    assert names_of_next(it) == ["old"]


def test_shortest_admits_the_shortest_prompt_and_ages() -> None:
    clock = Clock()
    it = scheduler(clock=clock, policy="shortest", max_sequences=1, shortest_ageing_tokens=10)
    it.add(ask("long", 30, max_tokens=1))
    it.add(ask("short", 4, max_tokens=1))
    assert names_of_next(it) == ["short"]
    clock.now = 3.0
    it.add(ask("newer", 4, max_tokens=1))
    assert names_of_next(it) == ["long"]


def test_admission_keeps_the_watermark_free_while_others_run() -> None:
    info = replace(INFO, num_blocks=10)
    it = scheduler(info, watermark=0.3)
    it.add(ask("a", 16))
    it.add(ask("b", (9, *range(1, 16))))
    assert len(step(it).chunks) == 1  # type: ignore[union-attr]
    assert len(it.waiting) == 1, "four of the six free blocks would leave less than three"


def test_a_lone_sequence_may_use_every_block() -> None:
    it = scheduler(replace(INFO, num_blocks=4), watermark=0.5)
    it.add(ask("a", 16, max_tokens=1))
    assert step(it) is not None


def test_the_newest_of_the_least_important_is_preempted_and_goes_to_the_head() -> None:
    it = scheduler(replace(INFO, num_blocks=6), watermark=0.0)
    it.add(ask("a", 7, max_tokens=30, priority=1))
    it.add(ask("b", (9, *range(1, 7)), max_tokens=30))
    it.add(ask("c", (8, *range(1, 7)), max_tokens=30))
    preempted = run_until_preempted(it)
    assert preempted == ["a"], "c is newer, but a matters least"
    it.add(ask("d", 2, max_tokens=30))
    assert [seq.request.id for seq in it.waiting] == ["a", "d"]


def run_until_preempted(it: object) -> list[str]:
    for _ in range(100):
        step(it)  # type: ignore[arg-type]
        if it.stats.preemptions:  # type: ignore[attr-defined]
            return [seq.request.id for seq in it.waiting]  # type: ignore[attr-defined]
    raise AssertionError("nobody was preempted")


def test_preemption_waits_until_nothing_is_in_flight() -> None:
    it = scheduler(replace(INFO, num_blocks=4), watermark=0.0)
    it.add(ask("a", 7, max_tokens=30))
    it.add(ask("b", (9, *range(1, 7)), max_tokens=30))
    batches = [it.schedule()]
    for _ in range(30):
        batch = it.schedule()  # with one in flight
        assert not it.stats.preemptions
        if batch is None:
            break
        batches.append(batch)
        it.update(answer(batches.pop(0)))  # type: ignore[arg-type]
    else:
        raise AssertionError("memory never ran out")
    it.update(answer(batches.pop(0)))  # type: ignore[arg-type]
    assert it.schedule() is not None and it.stats.preemptions == 1


def test_one_preempted_too_often_is_admitted_with_all_it_needs_and_left_alone() -> None:
    it = scheduler(replace(INFO, num_blocks=12), watermark=0.0, max_preemptions=1)
    for number in range(4):
        it.add(ask(str(number), (number + 1, 2, 3, 4, 5), max_tokens=40))
    counts: dict[str, int] = {}
    for _ in range(600):
        step(it)
        for seq in it.roster.sequences.values():
            counts[seq.request.id] = seq.num_preemptions
            if seq.num_preemptions and seq.started:
                assert len(seq.table.blocks) == 11, "44 positions"
    assert not it.roster.sequences
    assert max(counts.values()) == 1


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


def test_a_paused_sequence_is_skipped_and_goes_on_when_resumed() -> None:
    it = scheduler()
    it.add(ask("a", 5))
    step(it)
    it.pause("a")
    assert step(it) is None and it.has_work()
    it.resume("a")
    assert step(it) is not None


def test_a_paused_sequence_gives_way_to_one_that_waits_for_memory() -> None:
    it = scheduler(replace(INFO, num_blocks=4), watermark=0.0)
    it.add(ask("a", 13, max_tokens=3))
    step(it)
    it.pause("a")
    it.add(ask("b", (9, *range(1, 12)), max_tokens=1))
    assert names(it, it.schedule()) == ["b"]
    assert it.stats.preemptions == 1


def test_a_paused_sequence_gives_way_to_one_that_waits_for_a_row() -> None:
    it = scheduler(max_sequences=1)
    it.add(ask("a"))
    step(it)
    it.pause("a")
    it.add(ask("b", (9, 9)))
    assert names(it, it.schedule()) == ["b"]


def test_rows_held_by_finished_sequences_in_flight_are_not_given_away() -> None:
    it = scheduler(max_sequences=1)
    it.add(ask("a", max_tokens=9))
    first = it.schedule()
    second = it.schedule()
    assert first is not None and second is not None
    it.update(answer(first, token=50))  # end of sequence; the second batch is wasted
    it.add(ask("b", (9, 9)))
    assert it.schedule() is None
    it.update(answer(second))
    third = it.schedule()
    assert third is not None and third.released == (0,) and len(third.starts) == 1


def test_a_proposer_that_raises_ends_its_request_alone() -> None:
    def broken() -> object:
        def propose(tokens: object) -> list[int]:
            raise RuntimeError("no idea")

        return propose

    from vllm_core import Scheduler

    it = Scheduler(INFO, propose=broken)  # type: ignore[arg-type]
    it.add(ask("a", max_tokens=9))
    it.add(ask("b", (9, 9), max_tokens=1))
    step(it)
    step(it)
    ended = {output.request_id: output for output in it.take_outputs() if output.finished}
    assert ended["a"].error == "internal_error"
    assert ended["b"].finish_reason is FinishReason.LENGTH


def test_nothing_is_kept_of_finished_requests() -> None:
    it = scheduler()
    for number in range(50):
        it.add(ask(str(number), (number + 1, 2, 3), max_tokens=1))
        step(it)
        it.take_outputs()
    assert not it.roster.sequences and not it.roster._unfinished and not it.has_work()
    assert len(it.roster.released) <= 1
