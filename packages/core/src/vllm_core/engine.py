"""The step loop: launch one batch while the one before it is read.

Knows the order of calls and what to do when a batch fails. Decisions are the scheduler's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from vllm_traits import (
    BackendError,
    Batch,
    FinishReason,
    InFlight,
    ModelBackend,
    Request,
    RequestOutput,
)

from vllm_core.config import SchedulerConfig
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.finish import Ending
from vllm_core.scheduler.propose import ProposerFactory
from vllm_core.scheduler.scheduler import BACKEND_FAULT, Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """A scheduler and a backend. One thread calls it; `stats` may be read from any.

    Args:
        backend: Runs the batches; closed with the engine.
        config: Policy and limits.
        propose: Makes a proposer of drafts for each sequence, in place of the n-gram lookup.
        clock: Monotonic seconds.

    Raises:
        ConfigError: The configuration contradicts the backend.
    """

    def __init__(
        self,
        backend: ModelBackend,
        config: SchedulerConfig | None = None,
        *,
        propose: ProposerFactory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.config = config or SchedulerConfig()
        self.scheduler = Scheduler(
            backend.info, backend.stores, self.config, propose=propose, clock=clock
        )
        self.fault: BaseException | None = None  # what the last batch that failed raised
        self.is_dead = False
        self.progress = 0  # batches launched plus batches read
        self._previous: InFlight | None = None
        self._restarted = False  # a batch failed, and nothing was confirmed since
        self._closed = False
        self._host = threading.Lock()  # held while the host's state changes, not while waiting

    def add(self, request: Request, arrived_at: float | None = None) -> None:
        """Queue a request; its outputs come from `step`.

        Args:
            request: What to run.
            arrived_at: When it came in, in seconds of the clock; now, if not given.

        Raises:
            ContextLengthError: The prompt leaves no room for a completion.
            InvalidRequestError: It can never run, or its id is in use.
            QueueFullError: Too many requests are waiting.
            BackendError: The engine is dead or closed.
        """
        self._require_alive()
        with self._host:
            self.scheduler.add(request, arrived_at)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request in whatever state it is; its last output comes from the next `step`.

        Args:
            request_id: Unknown and finished ones are left alone.
            reason: Why it ends; `stop` if its reader has found what it wanted.
        """
        with self._host:
            self.scheduler.abort(request_id, reason)

    def pause(self, request_id: str) -> None:
        """Schedule a request no more until `resume`; what is in flight still arrives."""
        with self._host:
            self.scheduler.pause(request_id)

    def resume(self, request_id: str) -> None:
        """Undo `pause`."""
        with self._host:
            self.scheduler.resume(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything left to do, now or once a paused request is resumed."""
        return not self.is_dead and self.scheduler.has_work()

    def step(self) -> list[RequestOutput]:
        """Launch one batch; hand back the results of the one before it, or of this one.

        A batch that fails as a whole is not an error of the caller: everything starts again from
        confirmed tokens, without the newest admissions, which end with an error. If that fails
        too, before anything new was confirmed, every request ends with an error.

        Raises:
            BackendError: The engine is dead or closed.
        """
        self._require_alive()
        try:
            self._step()
        except Exception as fault:
            logger.exception("a batch failed")
            self._recover(fault)
        with self._host:
            return self.scheduler.take_outputs()

    def _step(self) -> None:
        with self._host:
            batch = self.scheduler.schedule()
        launched = self.backend.forward(batch) if batch else None  # the device is busy from here
        self._resolve()  # ... while the host reads the step before
        if batch and launched:
            launched.sample(self._masks(batch))
            self._previous = launched
            self.progress += 1
            if not self.config.overlap:
                self._resolve()

    def _resolve(self) -> None:
        if self._previous is None:
            return
        result = self._previous.result()
        self._previous = None
        self.progress += 1
        with self._host:
            if self.scheduler.update(result):
                self._restarted = False

    def _masks(self, batch: Batch) -> dict[int, bytes]:
        if not any(chunk.masked for chunk in batch.chunks):
            return {}
        with self._host:
            return self.scheduler.masks()

    def _recover(self, fault: Exception) -> None:
        self.fault = fault
        self._previous = None
        with self._host:
            self.scheduler.stats.batch_faults += 1
            self.scheduler.restart()
            if self._restarted:
                self.is_dead = True
                self.scheduler.finish_all(Ending(FinishReason.ERROR, error=BACKEND_FAULT))
            self._restarted = True

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges, as an independent copy taken between two changes."""
        with self._host:
            snapshot = self.scheduler.stats.copy()
            self.scheduler.fill_gauges(snapshot)
        return snapshot

    def close(self) -> list[RequestOutput]:
        """Abort what is unfinished and close the backend; returns the last outputs. Idempotent."""
        if self._closed:
            return []
        self._closed = True
        with self._host:
            self.scheduler.drop_in_flight()
            self.scheduler.finish_all(Ending(FinishReason.ABORT))
            outputs = self.scheduler.take_outputs()
        self.backend.close()
        return outputs

    def _require_alive(self) -> None:
        if self._closed:
            raise BackendError("The engine is closed.")
        if self.is_dead:
            raise BackendError(f"The backend failed twice in a row: {self.fault!r}")
