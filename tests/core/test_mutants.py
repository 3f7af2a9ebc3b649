"""Faults put in on purpose; the random runs have to notice every one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import pytest
from core_harness import SETTINGS, run
from vllm_core.kv_cache.cache import KVCache
from vllm_core.kv_cache.pool import BlockPool
from vllm_core.kv_cache.tiers import Tiers
from vllm_core.scheduler import results, scheduler
from vllm_core.scheduler.plan import Plan
from vllm_core.scheduler.planner import Planner
from vllm_core.scheduler.results import ResultReader
from vllm_core.scheduler.room import Room
from vllm_core.scheduler.roster import Roster
from vllm_core.scheduler.sequence import Sequence
from vllm_traits import VllmLiteError

Mutate = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutate] = {}

BROKEN = (AssertionError, LookupError, ValueError, TypeError, VllmLiteError)
MAX_SEEDS = 12  # times 48 settings, at most, until a mutant is caught


def mutant(make: Mutate) -> Mutate:
    MUTANTS[make.__name__] = make
    return make


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a function by `around(original, *args)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kw: around(original, *args, **kw))


@mutant
def drop_skips_the_first_block(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, BlockPool, "drop", lambda drop, pool, blocks: drop(pool, blocks[1:]))


@mutant
def a_block_is_freed_twice(patch: pytest.MonkeyPatch) -> None:
    def twice(let_go: Any, pool: BlockPool, block: int) -> None:
        let_go(pool, block)
        if pool.entries[block] is None:
            pool.empty.append(block)

    wrap(patch, BlockPool, "_let_go", twice)


@mutant
def a_reused_block_keeps_its_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_forget", lambda pool, block: None)


@mutant
def a_cached_block_is_shared_without_leaving_the_free_list(patch: pytest.MonkeyPatch) -> None:
    def share(pool: BlockPool, blocks: list[int]) -> None:
        for block in blocks:
            pool.refs[block] += 1

    patch.setattr(BlockPool, "share", share)


@mutant
def the_newest_token_is_published_without_kv(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        KVCache,
        "publish",
        lambda publish, cache, table, tokens, valid: publish(
            cache, table, tokens, min(valid + 1, len(tokens))
        ),
    )


@mutant
def a_full_hit_leaves_nothing_to_compute(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        KVCache,
        "_match",
        lambda match, cache, table, tokens, keep: match(cache, table, [*tokens, 0], keep),
    )


@mutant
def a_hit_is_not_verified(patch: pytest.MonkeyPatch) -> None:
    def match(pool: BlockPool, chain: Any, num_blocks: int) -> Any:
        keys = chain.keys[:num_blocks]
        found = [pool.block_of[key] for key in takewhile(pool.block_of.__contains__, keys)]
        last = pool.entries[found[-1]] if found else None
        return found, last.serial if last else chain.root

    patch.setattr(BlockPool, "match", match)


@mutant
def tenants_share_blocks(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        KVCache,
        "table",
        lambda table, cache, salt, adapter, reuses: table(cache, b"", adapter, reuses),
    )


@mutant
def prompt_logprobs_are_skipped_by_hits(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        KVCache,
        "table",
        lambda table, cache, salt, adapter, reuses: table(cache, salt, adapter, True),
    )


@mutant
def a_load_under_way_gives_its_blocks_away(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Tiers, "abandon", lambda _, tiers, loading, blocks: tiers._pool.drop(blocks))


@mutant
def a_save_does_not_hold_its_blocks(patch: pytest.MonkeyPatch) -> None:
    def save(original: Any, tiers: Tiers, keys: Any, blocks: list[int]) -> None:
        original(tiers, keys, blocks)
        copy, held = tiers.copies.pop()
        tiers._pool.drop(held)
        tiers.copies.append((copy, []))

    wrap(patch, Tiers, "save", save)


@mutant
def a_partial_load_counts_as_whole(patch: pytest.MonkeyPatch) -> None:
    def poll(original: Any, cache: KVCache, table: Any) -> None:
        was_loading = table.loading is not None
        original(cache, table)
        if was_loading and table.loading is None:
            cache._publish_until(table, min(len(table.blocks), len(table.chain.keys)))

    wrap(patch, KVCache, "poll_load", poll)


@mutant
def sessions_never_make_way(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        KVCache, "make_available", lambda cache, number: cache.pool.num_available >= number
    )


@mutant
def finished_in_flight_gives_its_blocks_back_at_once(patch: pytest.MonkeyPatch) -> None:
    def close(original: Any, roster: Roster, seq: Sequence, reason: Any) -> None:
        in_flight, seq.in_flight = seq.in_flight, 0
        original(roster, seq, reason)
        seq.in_flight = in_flight

    wrap(patch, Roster, "_close", close)


@mutant
def abort_forgets_those_who_wait(patch: pytest.MonkeyPatch) -> None:
    def abort(original: Any, self: Any, request_id: str) -> None:
        seq = self.roster.find(request_id)
        if seq is None or seq.started:
            original(self, request_id)
        else:
            del self.roster._unfinished[request_id]

    wrap(patch, scheduler.Scheduler, "abort", abort)


@mutant
def a_released_row_is_not_told(patch: pytest.MonkeyPatch) -> None:
    def let_go(original: Any, roster: Roster, seq: Sequence) -> None:
        original(roster, seq)
        roster.released = roster.released[:-1]

    wrap(patch, Roster, "let_go", let_go)


@mutant
def a_preempted_sequence_forgets_its_completion(patch: pytest.MonkeyPatch) -> None:
    def start(original: Any, plan: Plan, seq: Sequence) -> None:
        tokens, seq.tokens = seq.tokens, seq.tokens[: seq.num_prompt]
        original(plan, seq)
        seq.tokens = tokens

    wrap(patch, Plan, "start", start)


@mutant
def preemption_keeps_the_counters(patch: pytest.MonkeyPatch) -> None:
    def forget(original: Any, seq: Sequence) -> None:
        computed = seq.computed
        original(seq)
        seq.computed = computed

    wrap(patch, Sequence, "forget_backend", forget)


@mutant
def preemptions_have_no_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Room, "_victim", lambda room, among: next(reversed([*among]), None))


@mutant
def a_chunk_ends_off_the_grid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Plan, "cut", lambda plan, seq: min(seq.todo, plan.budget))


@mutant
def drafts_are_asked_for_before_a_sample(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Planner, "_is_prompt", staticmethod(lambda seq: not seq.paused and seq.todo > 1))


@mutant
def rejected_drafts_count_as_computed(patch: pytest.MonkeyPatch) -> None:
    def read(original: Any, reader: ResultReader, seq: Sequence, chunk: Any, *rest: Any) -> None:
        original(reader, seq, chunk, *rest)
        seq.computed += chunk.num_drafts

    wrap(patch, ResultReader, "_read_tokens", read)


@mutant
def tokens_after_a_stop_are_kept(patch: pytest.MonkeyPatch) -> None:
    def confirm(original: Any, seq: Sequence, new_tokens: Any, eos: Any) -> Any:
        end = original(seq, new_tokens, eos)
        seq.tokens.extend(new_tokens[1:] if end else ())
        return end

    wrap(patch, results, "confirm", confirm)


@mutant
def min_tokens_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def ending(original: Any, seq: Sequence, eos: frozenset[int]) -> Any:
        end = original(seq, eos)
        return end if end is None or seq.params.min_tokens == 0 else end._replace(stop_token_id=0)

    wrap(patch, results, "ending", ending)
    wrap(patch, results, "confirm", lambda confirm, seq, new, eos: confirm(seq, new, frozenset()))


@mutant
def a_paused_sequence_runs_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler.Scheduler, "pause", lambda self, request_id: None)


@mutant
def a_resumed_sequence_stays_paused(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(scheduler.Scheduler, "resume", lambda self, request_id: None)


@mutant
def a_failed_row_goes_on(patch: pytest.MonkeyPatch) -> None:
    def fail(original: Any, roster: Roster, seq: Sequence, code: str, *rest: Any) -> None:
        if code != "row_failed":
            original(roster, seq, code, *rest)

    wrap(patch, Roster, "fail", fail)


@mutant
def a_grammar_is_not_advanced(patch: pytest.MonkeyPatch) -> None:
    def confirm(original: Any, seq: Sequence, new_tokens: Any, eos: Any) -> Any:
        grammar = seq.request.grammar
        if grammar is not None:
            object.__setattr__(seq.request, "grammar", None)
        end = original(seq, new_tokens, eos)
        object.__setattr__(seq.request, "grammar", grammar)
        return end

    wrap(patch, results, "confirm", confirm)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logging.disable(logging.CRITICAL)
    MUTANTS[name](monkeypatch)
    try:
        assert is_caught(), f"{name} survived"
    finally:
        logging.disable(logging.NOTSET)


def is_caught() -> bool:
    for seed in range(MAX_SEEDS):
        for setting in SETTINGS:
            try:
                run(seed, setting)
            except BROKEN:
                return True
    return False
