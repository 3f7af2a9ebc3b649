"""One HTTP exchange: the request's head, its body within limits, and the way back.

Adds the headers every answer has, and remembers what the access log and the metrics want to know.
Knows no routes.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_server.openai.errors import ApiError
from vllm_server.ops.asgi import Message, Receive, Scope, Send

BODY_SECONDS = 30.0
JSON_TYPE = "application/json; charset=utf-8"

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_STANDARD = [(b"server", b"vllm-lite"), (b"x-content-type-options", b"nosniff")]


@dataclass
class Reply:
    """A complete answer.

    Attributes:
        body: The bytes.
        status: HTTP status.
        headers: Headers of its own.
        content_type: Media type of the body.
    """

    body: bytes
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    content_type: str = JSON_TYPE


class Exchange:
    """One request and its answer.

    Args:
        scope: The ASGI scope, of type http.
        receive: The ASGI receive.
        send: The ASGI send.

    Attributes:
        id: The client's request id if it is well-formed, else a random one.
        has_random_id: Whether it is a random one.
        method: Upper-case method.
        path: The path exactly as it was sent, without the root path; routing and authentication
            both read this one.
        headers: Lower-case names and values.
        peer: Address of the socket, None for a Unix socket.
        handler: Pattern of the route, for metrics.
        status: Status sent, 0 before.
        num_sent: Body bytes sent.
        num_received: Body bytes received.
        num_prompt_tokens: For the access log.
        num_completion_tokens: For the access log.
        first_token_at: For the access log; seconds as `started`.
        started: Seconds of `time.perf_counter`.
        disconnected: Whether the client is gone.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path = _path(scope)
        self.headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        client = scope.get("client")
        self.peer: str | None = client[0] if client and client[0] else None
        given = self.header(b"x-request-id")
        is_good = given is not None and _REQUEST_ID.fullmatch(given)
        self.has_random_id = not is_good
        self.id = given.decode() if given and is_good else secrets.token_hex(16)
        self.handler = "unknown"
        self.status = 0
        self.num_sent = 0
        self.num_received = 0
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.first_token_at: float | None = None
        self.started = time.perf_counter()
        self.disconnected = False
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> bytes | None:
        """Value of the first header of a name."""
        for each, value in self.headers:
            if each == name:
                return value
        return None

    async def read_body(self, limit: int, seconds: float = BODY_SECONDS) -> bytes:
        """The whole body.

        Raises:
            ApiError: 413 if it is larger than `limit` bytes, 408 if it is not there in time, 400
                for an encoding or a media type that is not read.
        """
        self._check_head(limit)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(seconds):
                while await self._read_part(parts):
                    if self.num_received > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise ApiError(
                408, "request_timeout", "The request body did not arrive in time.",
                headers=[("connection", "close")],
            ) from None  # fmt: skip
        if self.num_received > limit:
            raise _too_large(limit)
        return b"".join(parts)

    async def _read_part(self, parts: list[bytes]) -> bool:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.disconnected = True
            raise asyncio.CancelledError
        part: bytes = message.get("body", b"")
        parts.append(part)
        self.num_received += len(part)
        return bool(message.get("more_body", False))

    def _check_head(self, limit: int) -> None:
        encoding = self.header(b"content-encoding")
        if encoding is not None and encoding.lower() != b"identity":
            raise ApiError(
                400, "invalid_json", "A compressed request body (Content-Encoding) is not read."
            )
        kind = (self.header(b"content-type") or b"application/json").split(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            raise ApiError(
                400, "invalid_json", "The request's Content-Type must be application/json."
            )
        length = self.header(b"content-length")
        if length is not None and (not length.isdigit() or int(length) > limit):
            raise _too_large(limit)

    async def wait_disconnect(self) -> None:
        """Return when the client is gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.disconnected = True

    async def start(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Send the head of the answer."""
        self.status = status
        own = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers]
        standard = [*_STANDARD, (b"x-request-id", self.id.encode()), *self.extra_headers]
        message: Message = {
            "type": "http.response.start",
            "status": status,
            "headers": [*standard, *own],
        }
        await self._send(message)

    async def send_body(self, body: bytes, more: bool = False) -> None:
        """Send a piece of the answer's body."""
        self.num_sent += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, reply: Reply) -> None:
        """Send a complete answer."""
        about_body = [
            ("content-type", reply.content_type),
            ("content-length", str(len(reply.body))),
        ]
        await self.start(
            reply.status, [*(about_body if reply.status != 204 else ()), *reply.headers]
        )
        await self.send_body(b"" if self.method == "HEAD" else reply.body)

    def cut(self) -> None:
        """Drop the connection without waiting for the client to read."""
        extensions: dict[str, Any] = self.scope.get("extensions") or {}
        abort = extensions.get("vllm_lite.cut")
        if abort is not None:
            abort()


def _path(scope: Scope) -> str:
    """Encoded characters stay encoded, so that no other spelling of a path is a route."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = raw.split(b"?")[0].decode("latin-1")
    root: str = scope.get("root_path") or ""
    return path.removeprefix(root) if root else path


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        "request_too_large",
        f"The request body is larger than {limit} bytes.",
        headers=[("connection", "close")],
    )
