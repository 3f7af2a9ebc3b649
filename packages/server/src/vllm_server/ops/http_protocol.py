"""HTTP/1.1 on a socket, with the limits that uvicorn and its parser do not have.

Counts header bytes as they arrive, gives slow clients a deadline, and refuses what two parsers
could read differently: several or no Host, two lengths, folded lines, pipelining. A request that
passes is an ordinary ASGI call.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vllm_server.config.schema import ServerSettings
from vllm_server.openai.errors import ApiError, overloaded
from vllm_server.ops.exchange import JSON_TYPE

KEEP_ALIVE_SECONDS = 75

_FOLDED_OR_BARE = re.compile(rb"\n[ \t]|(?<!\r)\n|\x00")


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may do.

    Attributes:
        max_connections: Connections at once.
        max_head_bytes: Request line and header fields together.
        max_fields: Header fields.
        head_seconds: Time for the head to arrive.
        max_chunk_overhead: Framing bytes of a chunked body, beside 8 for each byte of it.
    """

    max_connections: int = 1024
    max_head_bytes: int = 16 * 1024
    max_fields: int = 64
    head_seconds: float = 10.0
    max_chunk_overhead: int = 64 * 1024


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        limits: What it may do.
        more: What uvicorn passes.
    """

    def __init__(self, limits: ConnectionLimits = ConnectionLimits(), **more: Any) -> None:
        super().__init__(**more)
        self._limits = limits
        self._refusal: ApiError | None = None
        self._is_refused = False
        self._in_head = True
        self._head = b""
        self._num_raw = 0
        self._num_body = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        self._arm()
        if len(self.connections) > self._limits.max_connections:
            self._refuse(overloaded())

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser in pieces, looking at the limits between them."""
        self._unset_keepalive_if_required()
        size = self._limits.max_head_bytes
        for at in range(0, len(data), size):
            if self._is_refused or self.transport.is_closing():
                return
            self._feed(data[at : at + size])

    def _feed(self, piece: bytes) -> None:
        if self._in_head:
            if not self._head and self._deadline is None:
                self._arm()
            self._head += piece
        else:
            self._num_raw += len(piece)
        try:
            self.parser.feed_data(piece)  # pyright: ignore[reportOptionalMemberAccess]
        except httptools.HttpParserUpgrade:
            return
        except httptools.HttpParserError:
            self._refuse(self._refusal or _malformed("it cannot be parsed"))
            return
        if self._in_head and len(self._head) > self._limits.max_head_bytes:
            self._refuse(_head_too_large())
        elif self._num_raw > self._limits.max_chunk_overhead + 8 * self._num_body:
            self._refuse(_malformed("its chunks carry too little"))

    def on_message_begin(self) -> None:
        """A request begins; the one before it must have been answered."""
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._fail(_malformed("another request was sent before the answer"))
        super().on_message_begin()
        self.scope["extensions"] = {"vllm_lite.cut": self.transport.abort}  # type: ignore[typeddict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        """One field of the head; fields after the body are refused."""
        if not self._in_head:
            self._fail(_malformed("it has fields after the body"))
        if len(self.headers) >= self._limits.max_fields:
            self._fail(_head_too_large())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is complete: check what needs all of it, then start the application."""
        self._disarm()
        self._check_head()
        self._in_head = False
        self._num_raw = self._num_body = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._num_body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete; the next one begins with a new head."""
        super().on_message_complete()
        self._in_head = True
        self._head = b""
        self._num_raw = 0
        if self.cycle.response_complete:
            self._wait_for_next()

    def on_response_complete(self) -> None:
        """The answer is out; a body that nobody waits for must end soon."""
        super().on_response_complete()
        if not self._in_head and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._limits.head_seconds, self.transport.close)

    def _wait_for_next(self) -> None:
        """Let an idle connection be, for a while."""
        self._disarm()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _check_head(self) -> None:
        names = [name for name, _ in self.headers]
        head = self._head.partition(b"\r\n\r\n")[0]
        if len(head) > self._limits.max_head_bytes:
            self._fail(_head_too_large())
        if names.count(b"host") != 1:
            self._fail(_malformed("it needs exactly one Host"))
        lengths = names.count(b"content-length")
        if lengths + names.count(b"transfer-encoding") > 1:
            self._fail(_malformed("its length is given twice"))
        if _FOLDED_OR_BARE.search(head):
            self._fail(_malformed("its head has a folded line or a bare line feed"))
        if not self.url.startswith(b"/"):
            self._fail(_malformed("its target is not a path"))

    def _fail(self, error: ApiError) -> None:
        """Leave the parser; `_feed` answers."""
        self._refusal = error
        raise ValueError(error.code)

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application and close."""
        self._is_refused = True
        self._disarm()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:  # pyright: ignore[reportUnnecessaryComparison]
            self.transport.write(_response(error))
        if cycle is not None:  # pyright: ignore[reportUnnecessaryComparison]
            cycle.disconnected = True  # the application has nobody to talk to any more
            cycle.message_event.set()
        self.transport.close()

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        """A connection on which nothing was asked is closed without a word."""
        if self._head:
            self._refuse(_too_slow())
        else:
            self.transport.close()

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _malformed(reason: str) -> ApiError:
    return ApiError(400, "invalid_http", f"The request is not clean HTTP: {reason}.")


def _head_too_large() -> ApiError:
    return ApiError(431, "headers_too_large", "The request's header is too large.")


def _too_slow() -> ApiError:
    return ApiError(408, "request_timeout", "The request's header did not arrive in time.")


def _response(error: ApiError) -> bytes:
    body = error.encoded()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
        f"server: vllm-lite\r\nx-content-type-options: nosniff\r\ncontent-type: {JSON_TYPE}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n"
    )
    more = "".join(f"{name}: {value}\r\n" for name, value in error.headers)
    return f"{head}{more}\r\n".encode("latin-1") + body


def uvicorn_config(app: Any, server: ServerSettings, **more: Any) -> uvicorn.Config:
    """How uvicorn serves an application of ours.

    Args:
        app: The ASGI application.
        server: The settings.
        more: Further arguments of `uvicorn.Config`.
    """
    limits = ConnectionLimits(max_connections=server.max_connections)
    return uvicorn.Config(
        app,
        http=partial(HttpProtocol, limits),  # pyright: ignore[reportArgumentType]
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        root_path=server.root_path,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        **more,
    )
