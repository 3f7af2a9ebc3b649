"""Many streams at once, streams that are cut, and streams that drain."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import httpx
import openai
import pytest

NUM_STREAMS = 256


async def read_stream(client: openai.AsyncOpenAI, number: int) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens of one stream."""
    stream = await client.chat.completions.create(
        model="vllm-lite-demo",
        messages=[{"role": "user", "content": f"Count from {number % 50} to {number % 50 + 6}."}],
        temperature=0,
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, reason, tokens = "", "", 0
    async for chunk in stream:
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, tokens


def test_256_streams_complete_and_are_counted_to_the_token(server: Any) -> None:
    async def run() -> list[tuple[str, str, int]]:
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        http = httpx.AsyncClient(limits=limits, timeout=170)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, http_client=http
        ) as client:
            return await asyncio.gather(*(read_stream(client, n) for n in range(NUM_STREAMS)))

    generated = server.metric("vllm:generation_tokens_total")
    results = asyncio.run(run())
    assert all(text and reason in ("stop", "length") for text, reason, _ in results)
    counted = server.metric("vllm:generation_tokens_total") - generated
    assert counted == sum(tokens for _, _, tokens in results)


def test_streams_that_are_cut_give_their_blocks_back(server: Any) -> None:
    def count() -> float:
        return server.metric("vllm:request_success_total", finished_reason="abort")

    before = count()
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    for _ in range(8):
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            next(response.iter_lines())
    server.wait_until_idle()
    assert count() == before + 8


def test_an_answer_that_nobody_waits_for_is_aborted(server: Any) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    server.wait_until_idle()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "shutdown"])
def test_stopping_lets_running_streams_finish(how: str, start_server: Any) -> None:
    server = start_server()
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        if how == "shutdown":
            assert httpx.post(f"{server.url}/shutdown").status_code == 202
        else:
            server.process.send_signal(getattr(signal, how))
        wait_for_status(server.url, 503)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"completion_tokens":400' in rest[-2].replace(" ", "")
    assert server.process.wait(timeout=30) == 0


def wait_for_status(url: str, status: int) -> None:
    """Until readiness says so, or the server no longer listens."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health/ready").status_code == status:
                return
        except httpx.TransportError:
            return
        time.sleep(0.01)
    raise AssertionError(f"never answered {status}")
