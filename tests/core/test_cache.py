"""Sessions, stores and queue order, each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from core_tools import INFO, Clock, ask, finish, last, said, scheduler, step
from vllm_core import Engine, SchedulerConfig
from vllm_core.testing import DictStore, SimBackend, violations
from vllm_traits import FinishReason


def test_a_session_keeps_its_blocks_from_being_evicted() -> None:
    it = scheduler(replace(INFO, num_blocks=16))
    it.add(ask("turn", 17, max_tokens=1, session_id="s"))
    step(it)
    assert it.cache.sessions.num_pinned == 4
    for number in range(6):
        it.add(ask(f"stranger {number}", (number + 30, *range(1, 17)), max_tokens=1))
        step(it)
    it.add(ask("next turn", 21, max_tokens=1, session_id="s"))
    step(it)
    assert it.take_outputs()[-1].num_cached_tokens == 16


def test_sessions_of_different_salts_are_different_sessions() -> None:
    it = scheduler()
    for salt in (b"me", b"you"):
        it.add(ask(str(salt), 17, max_tokens=1, session_id="s", salt=salt))
        step(it)
    assert len(it.cache.sessions.pins) == 2


def test_a_session_expires_by_the_injected_clock() -> None:
    clock = Clock()
    it = scheduler(clock=clock, session_ttl_s=60)
    it.add(ask("a", 17, max_tokens=1, session_id="s"))
    step(it)
    clock.now = 59.0
    it.schedule()
    assert it.cache.sessions.num_pinned == 4
    clock.now = 60.0
    it.schedule()
    assert it.cache.sessions.num_pinned == 0 and it.cache.pool.num_available == 64


def test_sessions_hold_at_most_their_share_and_the_oldest_gives_way() -> None:
    it = scheduler(replace(INFO, num_blocks=16), max_session_share=0.5)
    for name in "abc":
        it.add(ask(name, (ord(name) - 90, *range(1, 17)), max_tokens=1, session_id=name))
        step(it)
    assert [key[1] for key in it.cache.sessions.pins] == ["b", "c"]
    it.add(ask("long", 50, max_tokens=1, session_id="d"))
    step(it)
    assert it.cache.sessions.num_pinned == 8, "a longer chain is held up to the limit"


def test_sessions_give_way_before_anybody_is_preempted() -> None:
    it = scheduler(replace(INFO, num_blocks=8), watermark=0.0)
    it.add(ask("a", 13, max_tokens=1, session_id="s"))
    step(it)
    it.add(ask("b", (9, *range(1, 13)), max_tokens=20))
    while it.roster.sequences:
        step(it)
    assert it.stats.preemptions == 0 and it.cache.sessions.num_pinned == 0


def test_a_session_matches_by_content_only() -> None:
    it = scheduler()
    it.add(ask("a", 17, max_tokens=1, session_id="s"))
    step(it)
    it.add(ask("b", (9, *range(2, 18)), max_tokens=1, session_id="s"))
    step(it)
    assert it.take_outputs()[-1].num_cached_tokens == 0


class FailingStore(DictStore):
    """Raises in one of its calls."""

    def __init__(self, call: str) -> None:
        super().__init__(delay=1)
        self.call = call

    def _maybe(self, call: str) -> None:
        if call == self.call:
            raise OSError("the disk is gone")

    def lookup(self, keys: Sequence[bytes]) -> int:
        self._maybe("lookup")
        return super().lookup(keys)

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> object:  # type: ignore[override]
        self._maybe("load")
        return super().load(keys, blocks)

    def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> object:  # type: ignore[override]
        self._maybe("save")
        return super().save(keys, blocks)


@pytest.mark.parametrize("call", ["lookup", "load", "save"])
def test_a_store_that_raises_is_a_miss_and_is_counted(call: str) -> None:
    store = FailingStore(call)
    engine = Engine(SimBackend(INFO, [store]))
    engine.add(ask("a", 17, max_tokens=3, ignore_eos=True))
    first = finish(engine)
    engine.scheduler.cache.forget()
    engine.add(ask("b", 17, max_tokens=3, ignore_eos=True))
    second = finish(engine)
    assert said(first, "a") == said(second, "b")
    assert engine.stats.store_faults > 0
    assert engine.scheduler.cache.pool.num_available == 64


def test_a_decode_worker_finds_what_a_prefill_worker_computed() -> None:
    shared: dict[bytes, list[int]] = {}
    prefill = Engine(SimBackend(INFO, [DictStore(contents=shared)]))
    prefill.add(ask("a", 30, max_tokens=1))
    alone = finish(prefill)
    decode = Engine(SimBackend(INFO, [DictStore(contents=shared)]))
    decode.add(ask("a", 30, max_tokens=8, ignore_eos=True))
    outputs = finish(decode)
    assert said(outputs, "a")[:1] == said(alone, "a")
    assert decode.stats.loaded_blocks == 7
    assert last(outputs, "a").num_cached_tokens == 28


def test_unfinished_saves_count_as_work_and_hold_their_blocks() -> None:
    engine = Engine(SimBackend(INFO, [DictStore(delay=50)]))
    engine.add(ask("a", 17, max_tokens=1))
    while engine.scheduler.roster.sequences:
        engine.step()
    assert engine.has_work() and engine.scheduler.cache.pool.num_available == 60
    finish(engine)
    assert engine.scheduler.cache.pool.num_available == 64 and engine.stats.saved_blocks == 4


def test_waiting_sequences_that_hold_loaded_blocks_cannot_deadlock() -> None:
    """The first in line does not fit, and those behind it hold, or are loading, what it needs."""
    shared: dict[bytes, list[int]] = {}
    info = replace(INFO, num_blocks=12, max_sequences=2)
    filler = Engine(SimBackend(INFO, [DictStore(contents=shared)]))
    prompts = [(number + 30, *range(1, 29)) for number in range(4)]
    for number, prompt in enumerate(prompts):
        filler.add(ask(str(number), prompt, max_tokens=1))
    finish(filler)
    for delay in (1, 3, 8):
        store = DictStore(delay=delay, contents=shared)
        engine = Engine(SimBackend(info, [store]), SchedulerConfig(watermark=0.0))
        engine.add(ask("first", (29, *range(1, 40)), max_tokens=6, ignore_eos=True))
        for number, prompt in enumerate(prompts):
            engine.add(ask(str(number), prompt, max_tokens=6, ignore_eos=True))
        outputs = finish(engine)
        assert all(len(said(outputs, str(number))) == 6 for number in range(4))


def test_blocks_of_a_request_that_finishes_in_its_first_step_are_published() -> None:
    engine = Engine(SimBackend(INFO, [DictStore()]))
    engine.add(ask("a", 16, max_tokens=1))
    finish(engine)
    assert len(engine.scheduler.cache.pool.block_of) == 4


def test_the_newest_token_has_no_kv_and_is_not_published() -> None:
    it = scheduler()
    it.add(ask("a", 7, max_tokens=1))
    step(it)
    assert len(it.cache.pool.block_of) == 1, "the eighth token fills a block, but has no KV"


def test_a_finished_sequence_keeps_its_blocks_through_its_wasted_step() -> None:
    engine = Engine(SimBackend(INFO))
    engine.add(ask("a", 5, max_tokens=9, stop_token_ids=frozenset(range(1, 51))))
    engine.step()
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.STOP
    assert engine.scheduler.cache.pool.num_available == 62 and engine.has_work()
    assert not violations(engine.scheduler)
    finish(engine)
    assert engine.scheduler.cache.pool.num_available == 64


def test_drafts_are_not_asked_for_right_after_a_last_prompt_chunk_of_one_token() -> None:
    it = scheduler(replace(INFO, num_drafts=3), max_batch_tokens=4)
    it.add(ask("a", 5, max_tokens=20))
    first, second = it.schedule(), it.schedule()
    assert first is not None and second is not None
    assert (second.chunks[0].num_tokens, second.chunks[0].num_drafts) == (1, 0)
    third = it.schedule()
    assert third is not None and third.chunks[0].num_drafts == 3


def test_running_out_of_memory_with_nothing_in_flight_does_not_stop_the_engine() -> None:
    engine = Engine(SimBackend(replace(INFO, num_blocks=5)), SchedulerConfig(watermark=0.0))
    for number in range(3):
        engine.add(ask(str(number), (number + 1, 2, 3), max_tokens=12, ignore_eos=True))
    outputs = finish(engine)
    assert [len(said(outputs, str(number))) for number in range(3)] == [12, 12, 12]
    assert engine.stats.preemptions > 0
