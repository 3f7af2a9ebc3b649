"""Drives an OpenAI-compatible server: open loop by arrival times, closed loop by concurrency."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm_traits import ConfigError

from vllm_server.bench.client import Client, Target
from vllm_server.bench.report import Report, Result
from vllm_server.bench.workload import Prompt, Workload, arrivals

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class ServeLoad:
    """How to load a server.

    Attributes:
        url: Its address, with or without `/v1`.
        workload: What to ask.
        endpoint: `completions` or `chat`.
        model: Name to ask for; the server's first one by default.
        api_key: Sent as a bearer token.
        request_rate: Arrivals per second, Poisson; infinity is all at once.
        max_concurrency: Requests in flight at most; None is no bound.
        num_warmups: Requests sent before the clock starts.
        temperature: 0 is greedy.
        ignore_eos: Ask for exactly the output length, with a field OpenAI itself does not know.
        timeout: Seconds per request.
        goals: Limits in milliseconds for goodput.
    """

    url: str
    workload: Workload
    endpoint: str = "completions"
    model: str | None = None
    api_key: str | None = None
    request_rate: float = float("inf")
    max_concurrency: int | None = None
    num_warmups: int = 1
    temperature: float = 0.0
    ignore_eos: bool = True
    timeout: float = 600.0
    goals: tuple[tuple[str, float], ...] = ()


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    def has_text(self) -> bool:
        delta = self.delta
        return bool(
            self.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning))
        )


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: object = None


async def run(load: ServeLoad) -> Report:
    """Send the whole workload and measure.

    Raises:
        ConfigError: The server cannot be reached or names no model.
    """
    try:
        target = Target.parse(load.url)
    except ValueError as error:
        raise ConfigError(f"--url: {error}.") from None
    async with Client(target, load.api_key) as client:
        model = load.model or await _first_model(client, load.url)
        prompts = load.workload.prompts()
        for prompt in prompts[: load.num_warmups]:
            await _measure(client, load, _body(load, model, prompt))
        start = time.perf_counter()
        results = await _send_all(client, load, [_body(load, model, p) for p in prompts])
        seconds = max(r.end for r in results) - start
    return Report(_setting(load, model), seconds, results, dict(load.goals))


async def _first_model(client: Client, url: str) -> str:
    try:
        answer = await client.send("GET", "/v1/models")
        if answer.status != 200:
            raise ConfigError(
                f"{url} answers with status {answer.status}; wait until it is ready, or give its "
                "--api-key."
            )
        return str(json.loads(answer.body)["data"][0]["id"])
    except OSError as error:
        raise ConfigError(f"Cannot reach {url}: {error}. Is the server running?") from None
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{url} lists no model; name one with --model.") from None


def _body(load: ServeLoad, model: str, prompt: Prompt) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": prompt.output_len,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.endpoint == "chat":
        body["messages"] = [{"role": "user", "content": prompt.content}]
    else:
        body["prompt"] = prompt.content
    if load.ignore_eos:
        body["ignore_eos"] = True
    return msgspec.json.encode(body)


async def _send_all(client: Client, load: ServeLoad, bodies: Sequence[bytes]) -> list[Result]:
    """Start every request at its arrival time, or as soon as the concurrency allows."""
    gate = asyncio.Semaphore(load.max_concurrency or len(bodies))
    begin = asyncio.get_running_loop().time()

    async def one(arrival: float, body: bytes) -> Result:
        await asyncio.sleep(begin + arrival - asyncio.get_running_loop().time())
        async with gate:
            return await _measure(client, load, body)

    times = arrivals(len(bodies), load.request_rate, load.workload.seed)
    return await asyncio.gather(*map(one, times, bodies))


class _Recorder:
    """Takes the events of one answer and notes times, usage and errors."""

    def __init__(self) -> None:
        self.result = Result(start=time.perf_counter())
        self._finished = False

    def __call__(self, data: bytes) -> None:
        """Take one event."""
        if data == b"[DONE]":
            self._finished = True
            return
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.MsgspecError:
            self.result.error = "bad_event"
            return
        if any(choice.has_text() for choice in event.choices):
            self.result.times.append(time.perf_counter())
        if event.usage is not None:
            self.result.num_prompt_tokens = event.usage.prompt_tokens
            self.result.num_output_tokens = event.usage.completion_tokens
        if event.error is not None:
            self.result.error = "stream_error"

    def finish(self, status: int) -> None:
        """The answer is complete."""
        if status != 200:
            self.result.error = f"http_{status}"
        elif not self._finished:
            self.result.error = self.result.error or "no_done_event"


async def _measure(client: Client, load: ServeLoad, body: bytes) -> Result:
    recorder = _Recorder()
    result = recorder.result
    try:
        async with asyncio.timeout(load.timeout):
            answer = await client.send("POST", ENDPOINTS[load.endpoint], body, recorder)
        recorder.finish(answer.status)
    except TimeoutError:
        result.error = "timeout"
    except OSError:
        result.error = "connection"
    result.end = time.perf_counter()
    result.num_output_tokens = result.num_output_tokens or len(result.times)
    return result


def _setting(load: ServeLoad, model: str) -> dict[str, Any]:
    """The JSON has no infinity, so an unlimited rate is a word."""
    rate = load.request_rate
    return {
        "url": load.url,
        "model": model,
        "endpoint": load.endpoint,
        "request_rate": "inf" if rate == float("inf") else rate,
        "max_concurrency": load.max_concurrency,
        "temperature": load.temperature,
        "ignore_eos": load.ignore_eos,
        "num_warmups": load.num_warmups,
        **msgspec.to_builtins(load.workload),
    }
