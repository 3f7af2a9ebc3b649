"""The official client against the real server with the embedded model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

WHAT = [{"role": "user", "content": "What is vllm-lite?"}]


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, question: str, **parameters: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="vllm-lite-demo", messages=messages, temperature=0, **parameters
    )


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("What is vllm-lite?", ["inference engine", "Python", "OpenAI"]),
        ("How do I start the server?", ["hatch run serve", "127.0.0.1:8000"]),
        ("What is 7 + 5?", ["12"]),
        ("Count from 3 to 7.", ["3, 4, 5, 6, 7"]),
        ("Hello!", ["!"]),
    ],
)
def test_the_embedded_model_answers(client: openai.OpenAI, question: str, words: list[str]) -> None:
    answer = chat(client, question)
    assert answer.choices[0].finish_reason == "stop"
    assert all(word in answer.choices[0].message.content for word in words), answer


def test_thinking_is_split_from_the_answer(client: openai.OpenAI) -> None:
    message = chat(client, "What is 7 + 5?").choices[0].message
    assert "<think>" not in message.content
    assert "12" in message.reasoning_content
    silent = chat(
        client,
        "What is 7 + 5?",
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )
    assert "12" in silent.choices[0].message.content
    assert not getattr(silent.choices[0].message, "reasoning_content", None)


def test_a_stream_has_the_text_and_usage_of_the_plain_answer(client: openai.OpenAI) -> None:
    plain = chat(client, "What is vllm-lite?")
    stream = chat(client, "What is vllm-lite?", stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_a_repeated_prompt_is_cached_in_whole_blocks(client: openai.OpenAI) -> None:
    question = "Repeat: " + " ".join(f"word{i}" for i in range(40))
    chat(client, question, max_tokens=4)
    usage = chat(client, question, max_tokens=4).usage
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached == (usage.prompt_tokens - 1) // 16 * 16 > 0


def test_completions_take_text_ids_and_lists(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="vllm-lite-demo", prompt=["Once upon a time", "Hello, my"], max_tokens=8, n=2, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 32
    by_ids = client.completions.create(
        model="vllm-lite-demo", prompt=[1, 2, 3], max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert by_ids.usage.completion_tokens == 3


def test_echo_scores_a_prompt_without_generating(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="vllm-lite-demo", prompt="Once upon a time", max_tokens=0, echo=True, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == "Once upon a time"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(p <= 0 for p in choice.logprobs.token_logprobs[1:])
    assert answer.usage.completion_tokens == 0


def test_logprobs_are_those_of_the_text(client: openai.OpenAI) -> None:
    choice = chat(client, "Hello!", logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content).startswith(choice.message.content)
    for entry in content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)


def test_embeddings_are_unit_vectors_that_know_their_neighbours(client: openai.OpenAI) -> None:
    texts = ["How do I start the server?", "How can I run the server?", "Tell me a story."]
    answer = client.embeddings.create(model="vllm-lite-demo", input=texts)
    a, b, c = (entry.embedding for entry in answer.data)

    def dot(x: list[float], y: list[float]) -> float:
        return sum(p * q for p, q in zip(x, y, strict=True))

    assert math.isclose(dot(a, a), 1.0, abs_tol=1e-3)
    assert dot(a, b) > dot(a, c)


def test_the_same_seed_gives_the_same_text_beside_strangers(client: openai.OpenAI) -> None:
    def sampled(n: int) -> Any:
        return client.chat.completions.create(
            model="vllm-lite-demo",
            messages=[{"role": "user", "content": "Tell me a story."}],
            temperature=1.0,
            seed=11,
            n=n,
            max_tokens=40,
        )

    alone, among = sampled(1), sampled(6)
    assert alone.choices[0].message.content == among.choices[0].message.content
    assert len({choice.message.content for choice in among.choices}) > 1


def test_models_are_listed_and_unknown_ones_are_refused(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["vllm-lite-demo"]
    assert client.models.retrieve("vllm-lite-demo").id == "vllm-lite-demo"
    with pytest.raises(openai.NotFoundError, match="vllm-lite-demo"):
        client.chat.completions.create(model="other", messages=WHAT)


def test_what_is_not_supported_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        chat(client, "Hi", tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat(client, "word " * 3000)


def test_a_stop_string_ends_the_request_as_stopped(client: openai.OpenAI, server: Any) -> None:
    name = "vllm:request_success_total"
    counted = {reason: server.metric(name, finished_reason=reason) for reason in ("stop", "abort")}
    answer = chat(client, "Count from 3 to 9.", stop=["7"])
    server.wait_until_idle()
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "7"
    assert "7" not in answer.choices[0].message.content
    assert server.metric(name, finished_reason="stop") == counted["stop"] + 1
    assert server.metric(name, finished_reason="abort") == counted["abort"]
