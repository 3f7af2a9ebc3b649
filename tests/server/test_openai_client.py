"""The official `openai` client against a real server on a free port."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

import openai
import pytest
import uvicorn
from vllm_server.config.schema import AuthSettings, ServerSettings, Settings
from vllm_server.ops.http_protocol import uvicorn_config

MESSAGES = [{"role": "user", "content": "hi"}]
ANSWER = "<think>\nhm\n</think>\n\nGrüße, 漢字 🙂!"


@contextlib.contextmanager
def listening(app):
    running = uvicorn.Server(uvicorn_config(app, ServerSettings()))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(
        target=lambda: asyncio.run(running.serve(sockets=[listener])), daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        running.should_exit = True
        thread.join(20)
        listener.close()


@pytest.fixture
def server(serve):
    """A server with one key, and its base URL."""
    settings = Settings(auth=AuthSettings(api_keys=("secret",), rate_limit_requests=0))
    harness = serve(ANSWER, settings=settings)
    with listening(harness.app) as url:
        yield harness, url


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server[1], api_key="secret", max_retries=0, timeout=30) as found:
        yield found


def test_chat(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2
    )
    message = answer.choices[0].message
    assert message.content == "Grüße, 漢字 🙂!"
    assert message.reasoning == "hm"
    assert answer.choices[1].message.content == message.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def test_streamed_chat(client):
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Grüße, 漢字 🙂!"
    assert chunks[-1].usage.total_tokens > 0


def test_the_streaming_helper(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Grüße, 漢字 🙂!"
    assert final.choices[0].finish_reason == "stop"


def test_completions(client):
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=5, echo=True, logprobs=1
    )
    assert [c.text for c in answer.choices] == ["a<think>\nhm\n", "b<think>\nhm\n"]
    assert answer.choices[0].logprobs.tokens[0] == "a"
    chunks = client.completions.create(model="tiny", prompt="a", max_tokens=5, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == "<think>\nhm\n"


def test_embeddings(client):
    answer = client.embeddings.create(model="tiny", input=["ab", "c"])
    assert len(answer.data) == 2
    assert sum(x * x for x in answer.data[0].embedding) == pytest.approx(1.0, abs=1e-6)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_errors_become_the_clients_exceptions(server, client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format={"type": "json_object"}
        )
    assert unsupported.value.code == "unsupported_parameter"
    other = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    server[0].state.start_drain()
    with pytest.raises(openai.InternalServerError) as draining:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert draining.value.status_code == 503


def test_the_async_client_holds_many_streams(server):
    async def one(client, stream):
        found = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=stream)
        if not stream:
            return found.choices[0].message.content
        return "".join([c.choices[0].delta.content or "" async for c in found])

    async def run():
        async with openai.AsyncOpenAI(base_url=server[1], api_key="secret", timeout=60) as client:
            texts = await asyncio.gather(*(one(client, i % 2 == 0) for i in range(32)))
            vector = await client.embeddings.create(model="tiny", input="a")
            models = [m.id async for m in client.models.list()]
        assert set(texts) == {"Grüße, 漢字 🙂!"}
        assert len(vector.data[0].embedding) == 8
        assert models == ["tiny", "org/tiny"]

    asyncio.run(run())
