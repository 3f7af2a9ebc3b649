"""All unfinished requests of an engine: takes them in, launches steps, reads what came back.

Knows no backend and no clock of its own; `Engine` calls it.
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
from vllm_core.scheduler.planner import Planner
from vllm_core.scheduler.propose import ProposerFactory
from vllm_core.scheduler.results import GRAMMAR_ERROR, ResultReader
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
        self._clock = clock
        self._intake = Intake(info, config, self.limits, self.cache, propose)
        self._planner = Planner(
            info, config, self.limits, self.cache, self.roster, self._intake.max_drafts
        )

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
        if self._planner.draining:
            if self.in_flight:
                return None
            self._room.make()
        plan = self._planner.plan()
        while not plan.chunks and not self.in_flight and self._room.unblock(self._planner.draining):
            plan = self._planner.plan()
        return self._launch(plan) if plan.chunks else None

    def _launch(self, plan: Plan) -> Batch:
        self.stats.steps += 1
        released, self.roster.released = tuple(self.roster.released), []
        batch = Batch(tuple(plan.chunks), tuple(plan.starts), released, self.stats.steps)
        self.in_flight.append(Launched(batch, plan.sequences))
        self.stats.iteration_tokens.observe(self.limits.max_batch_tokens - plan.budget)
        self.stats.mixed_steps += 0 < plan.num_decodes < len(plan.chunks)
        return batch

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
        self._planner.start_over()
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
