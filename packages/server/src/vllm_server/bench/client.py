"""A small HTTP client that streams server-sent events to a callback, made to measure others.

One keep-alive connection per request in flight; parsing is httptools and msgspec, so that the
client is not what limits hundreds of streams. Knows nothing of the bodies it sends.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools

OnEvent = Callable[[bytes], None]


class Target(NamedTuple):
    """Where requests go.

    Attributes:
        host: Name or address.
        port: TCP port.
        secure: Whether to speak TLS.
        prefix: Path before the endpoint, without a trailing slash.
    """

    host: str
    port: int
    secure: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """The target of a URL such as `http://127.0.0.1:8000` or `.../v1`.

        Raises:
            ValueError: It is no http or https URL.
        """
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http or https URL")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if secure else 80), secure, prefix)


class Answer(NamedTuple):
    """The end of an answer.

    Attributes:
        status: HTTP status.
        body: What came if it was no event stream, cut to 64 KiB.
    """

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    """One connection with at most one request on it."""

    def __init__(self) -> None:
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.Transport):
            self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.reusable = False
        self._fail(ConnectionResetError("closed in the middle of an answer"))

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))

    def send(self, head_and_body: bytes, on_event: OnEvent) -> asyncio.Future[Answer]:
        """Write a request; the future is done when its answer is complete."""
        if self._transport is None:
            raise ConnectionResetError("closed between two requests")
        self._parser = httptools.HttpResponseParser(self)
        self._on_event = on_event
        self._events = False
        self._body = bytearray()
        self.reusable = False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head_and_body)
        return self._done

    def close(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == b"content-type":
            self._events = value.startswith(b"text/event-stream")

    def on_body(self, body: bytes) -> None:
        """Called by the parser with a piece of the body."""
        self._body += body
        if not self._events:
            del self._body[65536:]
            return
        *events, rest = bytes(self._body).split(b"\n\n")
        self._body = bytearray(rest)
        for event in events:
            if event.startswith(b"data:"):
                self._on_event(event[5:].strip())

    def on_message_complete(self) -> None:
        """Called by the parser at the end of the answer."""
        self.reusable = self._parser.should_keep_alive()
        if self._done is not None and not self._done.done():
            self._done.set_result(Answer(self._parser.get_status_code(), bytes(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Client:
    """Sends requests to one server and reuses connections; an async context manager."""

    def __init__(self, target: Target, api_key: str | None = None) -> None:
        self._target = target
        self._idle: list[_Connection] = []
        self._tls = ssl.create_default_context() if target.secure else None
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        await asyncio.sleep(0)

    async def send(
        self, method: str, path: str, body: bytes = b"", on_event: OnEvent = lambda _: None
    ) -> Answer:
        """One request; events of a streamed answer go to the callback as they arrive.

        Raises:
            OSError: The connection failed or ended early.
        """
        head = (
            f"{method} {self._target.prefix}{path} HTTP/1.1\r\n"
            f"Host: {self._target.host}:{self._target.port}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection, done = await self._start(head.encode("latin-1") + body, on_event)
        try:
            answer = await done
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
        return answer

    async def _start(
        self, request: bytes, on_event: OnEvent
    ) -> tuple[_Connection, asyncio.Future[Answer]]:
        """Write the request on an idle connection that still lives, or on a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection, connection.send(request, on_event)
        loop = asyncio.get_running_loop()
        transport: Any
        transport, connection = await loop.create_connection(
            _Connection, self._target.host, self._target.port, ssl=self._tls
        )
        del transport
        return connection, connection.send(request, on_event)
