"""What a step contains, who gets in, and who gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from core_tools import INFO, Clock, answer, ask, names, run_until_preempted, scheduler, step
from vllm_core import Scheduler
from vllm_traits import FinishReason


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


def names_of_next(it: Scheduler) -> list[str]:
    batch = it.schedule()
    assert batch is not None
    found = names(it, batch)
    it.update(answer(batch))
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

    it = Scheduler(INFO, propose=broken)  # type: ignore[arg-type]
    it.add(ask("a", max_tokens=9))
    it.add(ask("b", (9, 9), max_tokens=1))
    step(it)
    step(it)
    ended = {output.request_id: output for output in it.take_outputs() if output.finished}
    assert ended["a"].error == "internal_error"
    assert ended["b"].finish_reason is FinishReason.LENGTH
