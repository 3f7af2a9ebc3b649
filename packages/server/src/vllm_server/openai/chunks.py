"""Chunks of streamed answers as bytes, with everything that repeats encoded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_server.text.reasoning import Parts

_encode = msgspec.json.encode


class Chunks:
    """The chunks of one stream.

    Args:
        head: The members that every chunk begins with.
        has_usage: Whether chunks carry a `usage` member.
    """

    def __init__(self, head: Mapping[str, Any], has_usage: bool) -> None:
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._has_usage = has_usage

    def choice(
        self,
        body: bytes,
        usage: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The event for the body of one choice; `extra` are further members of the chunk."""
        more = b"," + _encode(extra)[1:-1] if extra else b""
        return self._head + body + b"]" + more + self._tail(usage)

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """The event with the usage and no choice."""
        return self._head + b"]" + self._tail(usage)

    def _tail(self, usage: Mapping[str, Any] | None) -> bytes:
        if not self._has_usage:
            return b"}\n\n"
        return b',"usage":' + _encode(usage) + b"}\n\n"


def chat_delta(index: int, parts: Parts, extra: Mapping[str, Any]) -> bytes:
    """A chat choice with new text.

    Args:
        index: Of the choice.
        parts: The text.
        extra: Further members of the choice, such as `logprobs`.
    """
    if not extra and not parts.reasoning:
        return (
            b'{"index":%d,"delta":{"content":' % index
            + _encode(parts.content)
            + b'},"logprobs":null,"finish_reason":null}'
        )
    delta: dict[str, Any] = {}
    if parts.reasoning:
        delta["reasoning"] = delta["reasoning_content"] = parts.reasoning
    if parts.content or not parts.reasoning:
        delta["content"] = parts.content
    return _encode(
        {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **extra}
    )


def chat_first(index: int, extra: Mapping[str, Any]) -> bytes:
    """The first chunk of a chat choice: the role."""
    delta = {"role": "assistant", "content": ""}
    return _encode(
        {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **extra}
    )


def chat_finish(index: int, finish_reason: str | None, stop_reason: str | int | None) -> bytes:
    """The last chunk of a chat choice."""
    return _encode(
        {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
    )


def completion_delta(index: int, text: str, extra: Mapping[str, Any]) -> bytes:
    """A completion choice with new text; `extra` may hold the finish reason."""
    if not extra:
        return (
            b'{"index":%d,"text":' % index
            + _encode(text)
            + b',"logprobs":null,"finish_reason":null}'
        )
    return _encode({"index": index, "text": text, "logprobs": None, "finish_reason": None, **extra})
