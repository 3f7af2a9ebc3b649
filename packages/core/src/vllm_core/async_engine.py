"""An engine on a thread of its own, read from an event loop or from plain threads.

All backend calls happen on that one thread. Requests reach it as commands, outputs leave it
through mailboxes; each event loop is woken once per step. Decisions are the engine's.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from vllm_traits import (
    BackendError,
    FinishReason,
    InvalidRequestError,
    ModelBackend,
    QueueFullError,
    Request,
    RequestOutput,
    VllmLiteError,
)

from vllm_core.config import SchedulerConfig
from vllm_core.engine import Engine
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.propose import ProposerFactory
from vllm_core.scheduler.scheduler import BACKEND_FAULT
from vllm_core.streams import Mailbox, RequestStream, SyncStream

logger = logging.getLogger(__name__)

AnyStream = TypeVar("AnyStream", RequestStream, SyncStream)

MAX_UNREAD = 256  # tokens a reader may leave lying before its sequence pauses
POLL_S = 0.001  # how often copies from a store are looked at while nothing else happens


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Health is progress: an idle engine and a busy one are both well, a stuck one is not.

    Attributes:
        status: `dead` once the backend failed for good or the engine was closed.
        steps: Steps that brought something about.
        stalled_s: Seconds since the last of them while work is pending; 0 when idle.
        error: Why it is dead.
    """

    status: Literal["ok", "dead"]
    steps: int
    stalled_s: float
    error: str | None = None


class AsyncEngine:
    """The door to an engine for many concurrent callers.

    Args:
        backend: Runs the batches; used by the engine's thread alone.
        config: Policy and limits.
        propose: Makes a proposer of drafts for each sequence.
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
        self._engine = Engine(backend, config, propose=propose, clock=clock)
        self._clock = clock
        self._streams: dict[str, RequestStream | SyncStream] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._num_handed_over = 0  # requests among the commands
        self._border = threading.Condition()  # guards the three above, and wakes the thread
        self._thread: threading.Thread | None = None
        self._closing = False
        self._death: str | None = None
        self._steps = 0
        self._pending_since: float | None = None  # last progress while there is work
        self._idle_waiters: list[Future[None]] = []

    # -- the callers' side ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; requests are refused before. Idempotent."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    def generate(self, request: Request, max_unread: int | None = MAX_UNREAD) -> RequestStream:
        """Run a request; called on an event loop, which is never blocked.

        Args:
            request: What to run.
            max_unread: Tokens that may lie unread before the sequence pauses; None is no limit.

        Raises:
            ContextLengthError: The prompt leaves no room for a completion.
            InvalidRequestError: It can never run, or its id is in use.
            QueueFullError: Too many requests are waiting.
            BackendError: The engine is not running.
        """
        return self._submit(request, max_unread, RequestStream)

    def submit(self, request: Request, max_unread: int | None = MAX_UNREAD) -> SyncStream:
        """As `generate`, for a thread that blocks while it reads."""
        return self._submit(request, max_unread, SyncStream)

    def _submit(
        self,
        request: Request,
        max_unread: int | None,
        make: Callable[[Mailbox, Callable[[FinishReason], None], Callable[[], None]], AnyStream],
    ) -> AnyStream:
        arrived_at = self._clock()
        self._engine.scheduler.check(request)
        mailbox = Mailbox(request.id, max_unread)
        abort = partial(self.abort, request.id)
        stream = make(mailbox, abort, partial(self._send, partial(self._resume, mailbox)))
        with self._border:
            self._refuse(request)
            self._streams[request.id] = stream
            self._num_handed_over += 1
            self._commands.append(partial(self._add, request, arrived_at))
            self._border.notify()
        return stream

    def _refuse(self, request: Request) -> None:
        if self._thread is None:
            raise BackendError("The engine was not started.")
        if self._death is not None or self._closing:
            raise BackendError(self._death or "The engine is closed.")
        if request.id in self._streams:
            raise InvalidRequestError(
                f"A request with id {request.id!r} is still running.", code="conflict", param="id"
            )
        scheduler = self._engine.scheduler
        limit = scheduler.config.max_waiting
        if self._num_handed_over + scheduler.waiting.num_newcomers >= limit:
            scheduler.stats.rejected_queue_full += 1
            raise QueueFullError(f"{limit} requests are waiting already. Try again later.")

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request in whatever state it is; unknown and finished ones are left alone."""
        self._send(partial(self._engine.abort, request_id, reason))

    def _send(self, command: Callable[[], None]) -> None:
        with self._border:
            self._commands.append(command)
            self._border.notify()

    def snapshot(self) -> EngineStats:
        """Counters and gauges, exact between two changes; from any thread."""
        stats = self._engine.stats
        with self._border:
            stats.received += self._num_handed_over
            stats.num_waiting += self._num_handed_over
            stats.num_in_flight += self._num_handed_over
        return stats

    def health(self) -> EngineHealth:
        """How the engine is; from any thread, without waiting for the engine's."""
        since = self._pending_since
        stalled = 0.0 if since is None else max(0.0, self._clock() - since)
        status = "ok" if self._death is None else "dead"
        return EngineHealth(status, self._steps, stalled, self._death)

    async def drain(self, timeout: float) -> bool:
        """Wait until no request is running; refusing new ones is the caller's business.

        Args:
            timeout: Most seconds to wait.

        Returns:
            Whether everything ended in time.
        """
        idle: Future[None] = Future()
        with self._border:
            if not self._streams:
                return True
            self._idle_waiters.append(idle)
        try:
            await asyncio.wait_for(asyncio.wrap_future(idle), timeout)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """End every open stream, stop the thread and close the backend. Idempotent."""
        with self._border:
            self._closing = True
            self._border.notify()
        if self._thread is not None:
            self._thread.join()
        else:
            self._engine.close()

    # -- the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._border:
                while not (self._commands or self._closing or self._engine.has_work()):
                    self._pending_since = None
                    self._border.wait()
                if self._closing:
                    break
                if self._pending_since is None:
                    self._pending_since = self._clock()
                while self._commands:
                    self._commands.popleft()()
            if self._engine.has_work():
                self._step()
        self._stop()

    def _step(self) -> None:
        before = self._engine.progress
        try:
            outputs = self._engine.step()
        except Exception as fault:
            logger.exception("the engine failed")
            self._die(f"The engine failed: {fault!r}")
            return
        self._deliver(outputs)
        if self._engine.is_dead:
            self._die(f"The backend failed twice in a row: {self._engine.fault!r}")
        elif outputs or self._engine.progress > before:
            self._steps += 1
            self._pending_since = self._clock()
        else:
            self._rest()

    def _rest(self) -> None:
        """Nothing can be launched: wait for a reader, or look after copies of blocks."""
        copying = self._engine.scheduler.is_copying
        with self._border:
            if not self._commands and not self._closing:
                if not copying:
                    self._pending_since = None  # only paused requests are left
                self._border.wait(POLL_S if copying else None)

    def _add(self, request: Request, arrived_at: float) -> None:
        self._num_handed_over -= 1
        try:
            self._engine.add(request, arrived_at)
        except VllmLiteError as error:
            output = RequestOutput(request.id, (), FinishReason.ERROR, error=error.code)
            self._deliver([output])

    def _resume(self, mailbox: Mailbox) -> None:
        if mailbox.paused and mailbox.has_room:
            mailbox.paused = False
            self._engine.resume(mailbox.request_id)

    def _pause(self, mailbox: Mailbox) -> None:
        mailbox.paused = True
        self._engine.pause(mailbox.request_id)
        self._resume(mailbox)  # the reader may have caught up before it saw the flag

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Put outputs into their mailboxes and wake each event loop once."""
        woken: dict[asyncio.AbstractEventLoop, list[RequestStream]] = {}
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.finished:
                with self._border:
                    del self._streams[output.request_id]  # before a reader may use the id again
            stream.mailbox.put(output)
            if stream.mailbox.is_full and not stream.mailbox.paused and not output.finished:
                self._pause(stream.mailbox)
            if isinstance(stream, SyncStream):
                stream.wake()
            else:
                woken.setdefault(stream.loop, []).append(stream)
        for loop, streams in woken.items():
            try:
                loop.call_soon_threadsafe(_wake, streams)
            except RuntimeError:
                logger.info("an event loop was closed before %d of its streams", len(streams))
        if not self._streams:
            self._tell_idle()

    def _tell_idle(self) -> None:
        """Let go of those who wait until nothing runs."""
        with self._border:
            if self._streams:
                return
            waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def _die(self, death: str) -> None:
        """Every stream ends with an error, and nothing is accepted any more."""
        with self._border:
            self._death = death
            self._commands.clear()
            self._num_handed_over = 0
            open_ids = list(self._streams)
        self._deliver(
            [RequestOutput(each, (), FinishReason.ERROR, error=BACKEND_FAULT) for each in open_ids]
        )

    def _stop(self) -> None:
        """The thread's last act: abort what is open, close the backend."""
        self._pending_since = None
        self._deliver(self._engine.close())
        death = self._death or "The engine is closed."
        with self._border:
            open_ids = list(self._streams)
            self._death = death
            self._commands.clear()
            self._num_handed_over = 0
        self._deliver([RequestOutput(each, (), FinishReason.ABORT) for each in open_ids])


def _wake(streams: list[RequestStream]) -> None:
    for stream in streams:
        stream.wake()
