"""Decides who computes what in the next step, and reads what came back.

There are no phases: a sequence has positions still to compute, and a step computes some of them.
Prompt, chunked prompt, decode, draft verification and recompute are the same `Chunk`. Knows no
backend and no clock of its own; `Engine` calls it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as ReadOnly

from vllm_traits import (
    BackendInfo,
    Batch,
    BatchOutput,
    BlockStore,
    Chunk,
    FinishReason,
    Request,
    RequestOutput,
)

from vllm_core.config import SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.kv_cache.keys import Digest, sha256
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.finish import Ending
from vllm_core.scheduler.intake import Intake, Limits
from vllm_core.scheduler.plan import Launched, Plan
from vllm_core.scheduler.propose import ProposerFactory
from vllm_core.scheduler.results import GRAMMAR_ERROR, INTERNAL_ERROR, ResultReader
from vllm_core.scheduler.room import Room
from vllm_core.scheduler.roster import Roster
from vllm_core.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)

BACKEND_FAULT = "engine_unavailable"


class Scheduler:
    """All unfinished requests of an engine, and the blocks they hold.

    Args:
        info: Limits of the backend.
        stores: Other places where blocks may be.
        config: Policy and limits.
        propose: Makes a proposer of drafts for each sequence, in place of the n-gram lookup.
        clock: Monotonic seconds.
        digest: Of block keys; replaced in tests only.

    Raises:
        ConfigError: The limits contradict the backend's.
    """

    def __init__(
        self,
        info: BackendInfo,
        stores: ReadOnly[BlockStore] = (),
        config: SchedulerConfig | None = None,
        *,
        propose: ProposerFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
        digest: Digest = sha256,
    ) -> None:
        config = config or SchedulerConfig()
        self.info = info
        self.config = config
        self.limits = Limits.of(info, config)
        self.cache = KVCache(
            info,
            stores,
            enabled=config.prefix_cache,
            max_session_share=config.max_session_share,
            session_ttl_s=config.session_ttl_s,
            digest=digest,
        )
        self.stats = EngineStats(info.max_model_len)
        self.roster = Roster(self.cache, self.stats, config, clock)
        self.waiting = self.roster.waiting
        self.running = self.roster.running
        self.in_flight: deque[Launched] = deque()
        self._room = Room(self.cache, self.roster, config)
        self._results = ResultReader(self.roster, self.cache, self.stats, info.eos_token_ids)
        self._draining = False  # memory ran out: wait until nothing is in flight, then make room
        self._prompt_waits = False  # decodes used up the budget: next time a prompt goes first
        self._clock = clock
        self._intake = Intake(info, config, self.limits, self.cache, propose)

    # -- intake -----------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; reads only what never changes.

        Raises:
            InvalidRequestError: With what is wrong, and both values.
        """
        self._intake.check(request)

    def add(self, request: Request, arrived_at: float | None = None) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: It can never run, or its id is in use.
            QueueFullError: Too many requests are waiting.
        """
        self.check(request)
        self.roster.refuse(request.id)
        seq = self._intake.sequence(request, self._clock() if arrived_at is None else arrived_at)
        self.roster.add(seq)
        if seq.generates:
            self.stats.params_max_tokens.observe(seq.params.max_tokens)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request in whatever state it is; unknown and finished ones are left alone."""
        seq = self.roster.find(request_id)
        if seq is not None:
            self.roster.finish(seq, Ending(reason))

    def pause(self, request_id: str) -> None:
        """Schedule a request no more until `resume`; it keeps its blocks while they last."""
        seq = self.roster.find(request_id)
        if seq is not None:
            seq.paused = True
            seq.steady = False

    def resume(self, request_id: str) -> None:
        """Undo `pause`."""
        seq = self.roster.find(request_id)
        if seq is not None:
            seq.paused = False

    def has_work(self) -> bool:
        """Whether anything is unfinished: requests, batches, outputs or copies of blocks."""
        roster = self.roster
        return bool(roster.sequences or self.in_flight or roster.outputs or self.cache.tiers.copies)

    # -- planning a step --------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Plan the next step, or None if there is nothing to launch now."""
        self.cache.poll(self._clock())
        if self.cache.tiers:
            for seq in self.waiting:  # all of them: their blocks may be needed by the first in line
                self.cache.poll_load(seq.table)
        if self._draining:
            if self.in_flight:
                return None
            self._room.make()
        plan = self._plan()
        while not plan.chunks and not self.in_flight and self._room.unblock(self._draining):
            plan = self._plan()
        return self._launch(plan) if plan.chunks else None

    def _launch(self, plan: Plan) -> Batch:
        self.stats.steps += 1
        released, self.roster.released = tuple(self.roster.released), []
        batch = Batch(tuple(plan.chunks), tuple(plan.starts), released, self.stats.steps)
        self.in_flight.append(Launched(batch, plan.sequences))
        self.stats.iteration_tokens.observe(self.limits.max_batch_tokens - plan.budget)
        self.stats.mixed_steps += 0 < plan.num_decodes < len(plan.chunks)
        return batch

    def _plan(self) -> Plan:
        """Decodes first, then prompts in progress, then new ones, until the budget is used up."""
        plan = Plan(self.limits.max_batch_tokens, self.info.block_size)
        reserved = self.info.block_size if self._prompt_waits else 0
        self._prompt_waits = self._draining = False
        plan.budget -= reserved
        prompts = self._plan_decodes(plan)
        plan.budget += reserved
        plan.num_decodes = len(plan.chunks)
        self._plan_prompts(plan, prompts)
        if not self._draining:
            self._admit(plan)
        return plan

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """The next token of every running sequence; returns those whose prompt is not done.

        The loop is the hot path of the engine, so what is steady is planned in place.
        """
        prompts: list[Sequence] = []
        chunks, sequences, grow = plan.chunks, plan.sequences, self.cache.grow
        for seq in self._decode_order(plan.budget):
            if not seq.steady:
                if self._is_prompt(seq):
                    prompts.append(seq)
                elif plan.budget > 0 and not self._draining:
                    self._plan_special_decode(plan, seq)
                continue
            start, pending = seq.computed, seq.pending
            if pending and len(seq.tokens) + pending >= seq.max_length:
                continue  # everything it may still produce is in flight
            if plan.budget <= 0 or self._draining:
                continue
            new_blocks: tuple[int, ...] = ()
            if start >= seq.table.capacity:
                grown = grow(seq.table, start + 1)
                if grown is None:
                    self._draining = True
                    continue
                new_blocks = grown
            plan.budget -= 1
            chunks.append(Chunk(seq.id, start, 1, new_blocks))
            sequences.append(seq)
            seq.computed = start + 1
            seq.pending = pending + 1
            seq.in_flight += 1
        return prompts

    def _decode_order(self, budget: int) -> list[Sequence]:
        """Order of admission; if the budget may not suffice, who waited longest for a token."""
        if len(self.running) * (1 + self._intake.max_drafts) <= budget:
            return list(self.running.values())
        return sorted(self.running.values(), key=lambda seq: seq.times.last_token)

    @staticmethod
    def _is_prompt(seq: Sequence) -> bool:
        """More than the newest token is left to compute, in this step."""
        return not seq.paused and (seq.todo > 1 or (seq.todo == 1 and not seq.sampled))

    def _plan_special_decode(self, plan: Plan, seq: Sequence) -> None:
        """A decode that may carry drafts, a mask or logprobs."""
        if seq.paused or seq.is_fully_launched:
            return
        if seq.proposer is not None and seq.pending:
            return  # a draft of the host follows the newest token, which is in flight
        room = min(plan.budget - 1, seq.max_length - seq.num_launched - 1)
        num_drafts, draft_ids = self._drafts(seq, max(0, room))
        if seq.finished:
            return
        new_blocks = self.cache.grow(seq.table, seq.computed + 1 + num_drafts)
        if new_blocks is None and num_drafts:
            num_drafts, draft_ids = 0, ()
            new_blocks = self.cache.grow(seq.table, seq.computed + 1)
        if new_blocks is None:
            self._draining = True
            return
        plan.add(seq, 1 + num_drafts, new_blocks, (num_drafts, draft_ids))

    def _drafts(self, seq: Sequence, room: int) -> tuple[int, tuple[int, ...]]:
        """How many drafts the next chunk verifies, and which if the host guesses them."""
        if seq.request.grammar is not None:
            return 0, ()  # each draft would need a mask of its own
        if seq.proposer is None:
            return min(self.info.num_drafts, room), ()
        try:
            draft_ids = tuple(seq.proposer(seq.tokens)[:room])
        except Exception:
            logger.exception("the draft proposer of request %s failed", seq.request.id)
            self.roster.fail(seq, INTERNAL_ERROR)
            return 0, ()
        return len(draft_ids), draft_ids

    def _plan_prompts(self, plan: Plan, prompts: list[Sequence]) -> None:
        """Prompts in progress; their blocks were taken at admission."""
        for seq in prompts:
            num_tokens = plan.cut(seq)
            if num_tokens:
                plan.add(seq, num_tokens, ())
            else:
                self._prompt_waits = True

    def _admit(self, plan: Plan) -> None:
        """Start waiting sequences while rows, budget and blocks last; nobody is overtaken."""
        for seq in self.waiting.candidates(holding_first=bool(self.cache.tiers)):
            if self.roster.num_rows >= self.limits.max_sequences:
                return
            if plan.budget < self.info.block_size:
                self._prompt_waits = True
                return
            if seq.paused:
                continue
            keep_free = self.limits.watermark if self.running else 0
            held = self.cache.attach(seq.table, seq.tokens, keep_free)
            if held is None:
                continue  # a store is still loading its prefix
            seq.computed = held
            if not self._fit(seq, keep_free):
                return
            self._enter(plan, seq)

    def _fit(self, seq: Sequence, keep_free: int) -> bool:
        """Take blocks for everything it has to compute before it samples.

        One that was preempted too often takes all it can ever need, and never asks again.
        """
        reserves = seq.num_preemptions >= self.config.max_preemptions
        num_positions = seq.max_positions if reserves else len(seq.tokens)
        missing = self.cache.num_missing(seq.table, num_positions)
        if self.cache.make_available(missing + keep_free):
            self.cache.grow(seq.table, num_positions)
            return True
        if not seq.table.num_loaded:
            self.cache.release(seq.table)  # a hit costs nothing to find again; a load does
            seq.computed = 0
        return False

    def _enter(self, plan: Plan, seq: Sequence) -> None:
        """From waiting to running, with a first chunk."""
        self.roster.enter(seq)
        if seq.times.admitted is None:
            self._count_admission(seq)
        plan.start(seq)
        plan.add(seq, plan.cut(seq), tuple(seq.table.blocks))

    def _count_admission(self, seq: Sequence) -> None:
        now = self._clock()
        seq.times.admitted = seq.times.last_token = now
        seq.num_cached_tokens = seq.computed
        self.stats.queue_time.observe(now - seq.times.arrived)
        if seq.table.reuses:
            self.stats.prefix_cache_queries += seq.num_prompt
            self.stats.prefix_cache_hits += seq.table.num_hit * self.info.block_size

    # -- reading a step ----------------------------------------------------------------------------

    def masks(self) -> dict[int, bytes]:
        """Masks for the newest batch in flight; every earlier token must be known by now.

        A sequence that ended meanwhile gets a mask that allows everything: its result is dropped.
        """
        launched = self.in_flight[-1]
        masks: dict[int, bytes] = {}
        for chunk, seq in zip(launched.batch.chunks, launched.sequences, strict=True):
            if chunk.masked:
                masks[seq.id] = self._mask(seq)
        return masks

    def _mask(self, seq: Sequence) -> bytes:
        grammar = seq.request.grammar
        if grammar is not None and not seq.finished:
            try:
                return grammar.mask()
            except Exception:
                logger.exception("the grammar of request %s failed", seq.request.id)
                self.roster.fail(seq, GRAMMAR_ERROR)
        return b"\xff" * -(-self.info.vocab_size // 8)

    def update(self, output: BatchOutput) -> int:
        """Read the result of the oldest batch in flight; returns how many outputs it made."""
        num_before = len(self.roster.outputs)
        self._results.read(self.in_flight.popleft(), output, self._clock())
        return len(self.roster.outputs) - num_before

    @property
    def is_copying(self) -> bool:
        """Whether copies of blocks are under way, which only `schedule` notices to be done."""
        loading = any(seq.table.loading is not None for seq in self.waiting)
        return loading or bool(self.cache.tiers.copies)

    def take_outputs(self) -> list[RequestOutput]:
        """Hand out every output made since the last call."""
        return self.roster.take_outputs()

    def restart(self) -> None:
        """After a batch failed as a whole: everybody starts again from confirmed tokens.

        The newest admissions are suspected and fail: those whose start was in flight, or else the
        newest running one if it has company. What blocks contain is not trusted any more.
        """
        starts = {start.seq_id for each in self.in_flight for start in each.batch.starts}
        suspects = [seq for seq in self.running.values() if seq.id in starts]
        if not suspects and len(self.running) > 1:
            suspects = [next(reversed(self.running.values()))]
        self.drop_in_flight()
        self._draining = self._prompt_waits = False
        for seq in list(self.roster.sequences.values()):
            if seq.id in self.running:
                self.roster.requeue(seq)
            else:
                self.roster.let_go(seq)
        self.cache.forget()
        for seq in suspects:
            self.roster.fail(seq, BACKEND_FAULT)

    def drop_in_flight(self) -> None:
        """The results of batches in flight will never be read; who waited for one is let go."""
        for launched in self.in_flight:
            self.roster.released += launched.batch.released  # the backend may not have seen them
        self.in_flight.clear()
        for seq in list(self.roster.sequences.values()):
            seq.in_flight = 0
            if seq.finished:
                self.roster.leave(seq)

    def finish_all(self, end: Ending) -> None:
        """End every unfinished request."""
        for seq in list(self.roster.sequences.values()):
            if not seq.finished:
                self.roster.finish(seq, end)

    def fill_gauges(self, stats: EngineStats) -> None:
        """Write what can be read off the present state into `stats`."""
        pool, sessions = self.cache.pool, self.cache.sessions
        stats.num_running = len(self.running)
        stats.num_waiting = len(self.waiting)
        stats.num_in_flight = self.roster.num_unfinished
        stats.kv_usage = 1.0 - pool.num_available / len(pool.refs)
        stats.cached_blocks = len(pool.cached)
        stats.sessions = len(sessions.pins)
        stats.pinned_blocks = sessions.num_pinned
        stats.loaded_blocks = self.cache.tiers.num_loaded
        stats.saved_blocks = self.cache.tiers.num_saved
        stats.store_faults = self.cache.tiers.num_faults
