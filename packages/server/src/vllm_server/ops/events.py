"""Server-sent events on one exchange: when the head goes out, keep-alive, slow readers, errors.

Knows nothing of what the events say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from vllm_server.openai.errors import ApiError
from vllm_server.ops.exchange import Exchange

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-store"),
    ("x-accel-buffering", "no"),
)


class SlowReaderError(Exception):
    """A client took nothing for too long."""


def event(body: bytes) -> bytes:
    """One event with a JSON body."""
    return b"data: " + body + b"\n\n"


class EventStream:
    """Events that are sent as they come.

    Args:
        chunks: Whole events; closed when the stream ends in any way.
        headers: Headers of its own.
    """

    def __init__(
        self, chunks: AsyncGenerator[bytes, None], headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.chunks = chunks
        self.headers = headers


class EventSender:
    """Sends one stream.

    The head goes out with the first event, or with the first keep-alive; an error before it is an
    answer of its own, and after it an event.

    Args:
        exchange: Where to.
        keep_alive: Seconds of silence after which a comment is sent, 0 for never.
        stall: Seconds after which a reader that takes nothing is given up.
    """

    def __init__(self, exchange: Exchange, keep_alive: float, stall: float) -> None:
        self._exchange = exchange
        self._keep_alive = keep_alive or float("inf")
        self._stall = stall
        self._headers: Sequence[tuple[str, str]] = _HEADERS
        self._starting = asyncio.Lock()
        self._is_started = False
        self._is_stalled = False
        self._time = asyncio.get_running_loop().time
        self._busy_since: float | None = None
        self._last_sent = self._time()

    async def run(self, stream: EventStream) -> None:
        """Send every event, then the end mark.

        Raises:
            ApiError: Something went wrong before anything was sent.
            SlowReaderError: The client takes nothing.
        """
        self._headers = (*_HEADERS, *stream.headers)
        owner = asyncio.current_task()
        pulse = asyncio.create_task(self._pulse(owner))
        try:
            await self._send_all(stream)
            await self._send(DONE, more=False)
        except asyncio.CancelledError:
            if self._is_stalled and owner is not None and owner.uncancel() == 0:
                raise SlowReaderError from None
            raise
        finally:
            pulse.cancel()
            await stream.chunks.aclose()

    async def _send_all(self, stream: EventStream) -> None:
        try:
            async for chunk in stream.chunks:
                await self._send(chunk)
        except ApiError as error:
            if not self._is_started:
                raise
            await self._send(event(error.encoded()))

    async def _send(self, chunk: bytes, more: bool = True) -> None:
        self._busy_since = self._time()
        if not self._is_started:
            await self._start()
        await self._exchange.send_body(chunk, more)
        self._busy_since = None
        self._last_sent = self._time()

    async def _start(self) -> None:
        async with self._starting:
            if not self._is_started:
                self._is_started = True
                await self._exchange.start(200, self._headers)

    async def _pulse(self, owner: asyncio.Task[object] | None) -> None:
        """Comments while nothing is sent, and the end of a reader that takes nothing."""
        while True:
            now = self._time()
            if self._busy_since is not None:
                if now - self._busy_since >= self._stall and owner is not None:
                    self._is_stalled = True
                    owner.cancel()
                    return
            elif now - self._last_sent >= self._keep_alive:
                self._last_sent = now
                await self._comment()
            silence = self._keep_alive - (now - self._last_sent)
            await asyncio.sleep(max(0.005, min(silence, self._stall / 4)))

    async def _comment(self) -> None:
        await self._start()
        await self._exchange.send_body(KEEP_ALIVE, True)
