"""Which state each request is in, and every step from one state to the next.

    add -> waiting -> running -> finished -> (nothing in flight) -> gone
              ^----------'  preempted

Whoever plans or digests a step changes states through here only, so abort and failure are legal
everywhere. Nothing is kept of a request that is gone.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_traits import (
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    RequestOutput,
    TokenLogprobs,
)

from vllm_core.config import SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.finish import Ending
from vllm_core.scheduler.queue import WaitingQueue
from vllm_core.scheduler.sequence import Sequence


class Roster:
    """All sequences of an engine by state.

    Attributes:
        sequences: All that hold anything, here or in the backend.
        waiting: Those to be admitted.
        running: Those with a row, in order of admission.
        num_rows: Rows of the backend in use; a finished sequence keeps its row while in flight.
        released: Rows the backend is told to drop with the next batch.
        outputs: Made since they were last taken.
    """

    def __init__(
        self,
        cache: KVCache,
        stats: EngineStats,
        config: SchedulerConfig,
        clock: Callable[[], float],
    ) -> None:
        self.sequences: dict[int, Sequence] = {}
        self.waiting = WaitingQueue(config)
        self.running: dict[int, Sequence] = {}
        self.num_rows = 0
        self.released: list[int] = []
        self.outputs: list[RequestOutput] = []
        self._unfinished: dict[str, Sequence] = {}
        self._cache = cache
        self._stats = stats
        self._max_waiting = config.max_waiting
        self._clock = clock

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output was not made yet."""
        return len(self._unfinished)

    def find(self, request_id: str) -> Sequence | None:
        """The unfinished sequence of a request."""
        return self._unfinished.get(request_id)

    def refuse(self, request_id: str) -> None:
        """Raise if a new request with this id cannot be queued now.

        Raises:
            InvalidRequestError: The id is in use.
            QueueFullError: Too many requests are waiting.
        """
        if request_id in self._unfinished:
            raise InvalidRequestError(
                f"A request with id {request_id!r} is still running.", code="conflict", param="id"
            )
        if self.waiting.num_newcomers >= self._max_waiting:
            self._stats.rejected_queue_full += 1
            raise QueueFullError(
                f"{self._max_waiting} requests are waiting already. Try again later."
            )

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.sequences[seq.id] = seq
        self._unfinished[seq.request.id] = seq
        self.waiting.push(seq)
        self._stats.received += 1

    def enter(self, seq: Sequence) -> None:
        """From waiting to running."""
        self.waiting.remove(seq)
        self.running[seq.id] = seq
        self.num_rows += 1
        seq.started = True
        if seq.times.admitted is None:
            self._count_admission(seq)

    def _count_admission(self, seq: Sequence) -> None:
        now = self._clock()
        seq.times.admitted = seq.times.last_token = now
        seq.num_cached_tokens = seq.computed
        self._stats.queue_time.observe(now - seq.times.arrived)
        if seq.table.reuses:
            self._stats.prefix_cache_queries += seq.num_prompt
            self._stats.prefix_cache_hits += seq.table.num_hit * self._cache.block_size

    def preempt(self, seq: Sequence) -> None:
        """Take everything back to make room; it will start again from its confirmed tokens."""
        assert seq.in_flight == 0, "only a sequence with nothing in flight can be preempted"
        seq.num_preemptions += 1
        self._stats.preemptions += 1
        self.requeue(seq)

    def requeue(self, seq: Sequence) -> None:
        """From running back to waiting."""
        del self.running[seq.id]
        self.let_go(seq)
        self.waiting.push(seq)

    def let_go(self, seq: Sequence) -> None:
        """Give back a sequence's row and blocks; its confirmed tokens stay."""
        if seq.started:
            self.released.append(seq.id)
            self.num_rows -= 1
        self._cache.release(seq.table)
        seq.forget_backend()

    def finish(
        self,
        seq: Sequence,
        end: Ending,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        embedding: tuple[float, ...] = (),
    ) -> None:
        """End a sequence in whatever state it is, with its last output."""
        self._close(seq, end.reason)
        output = RequestOutput(
            request_id=seq.request.id,
            token_ids=token_ids,
            finish_reason=end.reason,
            stop_token_id=end.stop_token_id,
            num_cached_tokens=seq.num_cached_tokens,
            logprobs=logprobs,
            prompt_logprobs=seq.take_prompt_logprobs(),
            embedding=embedding,
            error=end.error,
        )
        self.outputs.append(output)

    def fail(self, seq: Sequence, code: str, token_ids: tuple[int, ...] = ()) -> None:
        """End a sequence alone with an error; nothing happens if it has ended already."""
        if not seq.finished:
            self.finish(seq, Ending(FinishReason.ERROR, error=code), token_ids)

    def _close(self, seq: Sequence, reason: FinishReason) -> None:
        now = self._clock()
        seq.finished = True
        seq.steady = False
        del self._unfinished[seq.request.id]
        if self.running.pop(seq.id, None) is None:
            self.waiting.remove(seq)
        num_tokens = len(seq.tokens) - seq.num_prompt
        self._stats.count_finish(reason, seq.times, now, num_tokens)
        if seq.times.admitted is not None:
            self._stats.num_preemptions.observe(seq.num_preemptions)
        if seq.request.session_id is not None and seq.table.num_published:
            session = (seq.request.salt, seq.request.session_id)
            self._cache.pin(session, seq.table, now)
        if seq.in_flight == 0:
            self.leave(seq)

    def leave(self, seq: Sequence) -> None:
        """A finished sequence with nothing in flight gives back what it holds and is forgotten."""
        self.let_go(seq)
        del self.sequences[seq.id]

    def take_outputs(self) -> list[RequestOutput]:
        """Hand out the outputs made so far."""
        outputs, self.outputs = self.outputs, []
        return outputs
