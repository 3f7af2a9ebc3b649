"""Where the outputs of one request wait for their reader, on an event loop or in a plain thread.

Back-pressure is a matter of two counters, each written by one thread: `sent` by the engine,
`read` by the reader. Knows nothing of scheduling.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from vllm_traits import FinishReason, RequestOutput


class Mailbox:
    """Outputs of one request between the engine's thread and a reader.

    Attributes:
        request_id: The request.
        paused: Set by the engine when the reader is too far behind.
        is_over: The last output was sent.
    """

    def __init__(self, request_id: str, max_unread: int | None) -> None:
        self.request_id = request_id
        self.paused = False
        self.is_over = False
        self._outputs: deque[RequestOutput] = deque()
        self._max_unread = max_unread
        self._sent = 0
        self._read = 0

    def put(self, output: RequestOutput) -> None:
        """Engine's side: leave an output."""
        self._sent += len(output.token_ids)
        self._outputs.append(output)
        self.is_over = output.finished

    @property
    def is_full(self) -> bool:
        """More tokens are unread than the reader may leave lying."""
        return self._max_unread is not None and self._sent - self._read > self._max_unread

    @property
    def has_room(self) -> bool:
        """The reader has caught up far enough to go on; lower than full, so as not to flutter."""
        return self._max_unread is None or self._sent - self._read <= self._max_unread // 2

    def take(self) -> RequestOutput | None:
        """Reader's side: everything unread as one output, or None."""
        taken: list[RequestOutput] = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._outputs.popleft())
        if not taken:
            return None
        merged = merge(taken)
        self._read += len(merged.token_ids)
        return merged


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    return outputs[-1]._replace(
        token_ids=tuple(token for each in outputs for token in each.token_ids),
        logprobs=tuple(entry for each in outputs for entry in each.logprobs),
        prompt_logprobs=next((e.prompt_logprobs for e in outputs if e.prompt_logprobs), ()),
    )


@dataclass(eq=False)
class Stream:
    """A reader's side of a request; how it waits is left to those built on this.

    Attributes:
        mailbox: Where the request's outputs are left.
    """

    mailbox: Mailbox
    _abort: Callable[[FinishReason], None]
    _resume: Callable[[], None]  # lets the engine go on with a request that it paused
    _ended: bool = field(default=False, init=False)

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.mailbox.request_id

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """End the request; its last output still comes. Nothing happens if it has ended.

        Args:
            reason: Why it ends; `stop` if the reader has found what it wanted.
        """
        if not self.mailbox.is_over:
            self._abort(reason)

    def _taken(self, output: RequestOutput) -> RequestOutput:
        """An output on its way to the reader."""
        if self.mailbox.paused:
            self._resume()
        self._ended = output.finished
        return output


@dataclass(eq=False)
class RequestStream(Stream):
    """Outputs of one request on an event loop; ends after the one with a finish reason.

    Outputs that nobody read coalesce. A task that is cancelled while it reads aborts the request,
    as does `aclose`; use `contextlib.aclosing` where the loop may be left early.
    """

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)
    _waiter: asyncio.Future[None] | None = field(default=None, init=False)

    async def aclose(self) -> None:
        """Abort and read no more."""
        self._ended = True
        self.abort()

    def wake(self) -> None:
        """Tell a waiting reader that there is something; called on the loop."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        output = self.mailbox.take()
        while output is None:
            self._waiter = self.loop.create_future()
            output = self.mailbox.take()  # it may have come before there was a waiter
            if output is None:
                await self._wait()
                output = self.mailbox.take()
        self._waiter = None
        return self._taken(output)

    async def _wait(self) -> None:
        assert self._waiter is not None, "nothing to wait for"
        try:
            await self._waiter
        except asyncio.CancelledError:
            await self.aclose()
            raise


@dataclass(eq=False)
class SyncStream(Stream):
    """Outputs of one request in a plain thread; iteration blocks. Otherwise as `RequestStream`."""

    _arrived: threading.Event = field(default_factory=threading.Event, init=False)

    def wake(self) -> None:
        """Tell a waiting reader that there is something; called from any thread."""
        self._arrived.set()

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        if self._ended:
            raise StopIteration
        output = self.mailbox.take()
        while output is None:
            self._arrived.wait()
            self._arrived.clear()
            output = self.mailbox.take()
        return self._taken(output)
