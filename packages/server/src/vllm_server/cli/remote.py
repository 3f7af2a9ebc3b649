"""A running server that answers in a chat."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_traits import ConfigError, InvalidRequestError

from vllm_server.bench.client import Client, Target
from vllm_server.cli.talk import Messages, Turn


class RemoteTalker:
    """Answers by asking a server.

    Args:
        url: Its address.
        key: Sent as a bearer token.
        model: Name to ask for; the server's first without.
        session: Id whose blocks the server may keep.
        parameters: Of every request, such as a temperature.

    Raises:
        ConfigError: It cannot be reached.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        model: str | None,
        session: str,
        parameters: Mapping[str, Any],
    ) -> None:
        try:
            self._target = Target.parse(url)
        except ValueError as error:
            raise ConfigError(f"--url: {error}.") from None
        self._key = key
        self._session = session
        self._parameters = parameters
        card = asyncio.run(self._card(url, model))
        self._model = str(card["id"])
        self._max_model_len = int(card.get("max_model_len") or 0)
        self.turn = Turn(tokens_left=self._max_model_len)

    async def _card(self, url: str, model: str | None) -> dict[str, Any]:
        try:
            async with Client(self._target, self._key) as client:
                answer = await client.send("GET", "/v1/models")
            cards: list[dict[str, Any]] = json.loads(answer.body)["data"]
            return next(card for card in cards if model in (None, card["id"]))
        except OSError as error:
            raise ConfigError(f"Cannot reach {url}: {error}. Is the server running?") from None
        except (ValueError, LookupError, TypeError, StopIteration):
            raise ConfigError(f"{url} does not serve {model or 'any model'}.") from None

    def answer(self, messages: Messages) -> Iterator[str]:
        body = {
            **self._parameters,
            "model": self._model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            "session_id": self._session,
        }
        request = _Request(self._target, self._key, json.dumps(body).encode())
        started = 0.0
        try:
            for event in request:
                text = _text_of(event)
                started = started or (time.monotonic() if text else 0.0)
                self._account(event.get("usage"), started)
                if text:
                    yield text
        finally:
            request.stop()

    def _account(self, usage: Any, started: float) -> None:
        if not usage:
            return
        details: dict[str, Any] = usage.get("prompt_tokens_details") or {}
        seconds = time.monotonic() - started if started else 0.0
        self.turn = Turn(
            tokens_left=max(0, self._max_model_len - usage["total_tokens"]),
            cached_tokens=details.get("cached_tokens") or 0,
            rate=(usage["completion_tokens"] - 1) / seconds if seconds > 0 else 0.0,
        )


def _text_of(event: Mapping[str, Any]) -> str:
    for choice in event.get("choices") or ():
        delta: dict[str, Any] = choice.get("delta") or {}
        return str(delta.get("reasoning_content") or "") + str(delta.get("content") or "")
    return ""


class _Request:
    """One streamed answer as an iterator of events, fetched on a thread with its own loop."""

    def __init__(self, target: Target, key: str | None, body: bytes) -> None:
        self._events: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._fetch(target, key, body))
        self._thread = threading.Thread(target=self._run, name="chat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except (OSError, InvalidRequestError, asyncio.CancelledError) as error:
            self._events.put(error)
        finally:
            self._events.put(None)

    async def _fetch(self, target: Target, key: str | None, body: bytes) -> None:
        def on_event(data: bytes) -> None:
            if data != b"[DONE]":
                self._events.put(json.loads(data))

        async with Client(target, key) as client:
            answer = await client.send("POST", "/v1/chat/completions", body, on_event)
        if answer.status != 200:
            raise InvalidRequestError(_reason(answer.status, answer.body))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (event := self._events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            if "error" in event:
                raise InvalidRequestError(str(event["error"].get("message")))
            yield event

    def stop(self) -> None:
        """Give up the rest of the answer, if any; closing the loop here leaves no race with it."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        self._loop.close()


def _reason(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered with status {status}"
