"""`/v1/chat/completions`, plain and streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec
from vllm_traits import TokenLogprobs

from vllm_server.openai.choice import Delta, chat_choice
from vllm_server.openai.chunks import Chunks, chat_delta, chat_finish, chat_first
from vllm_server.openai.logprobs import chat_entries, prompt_entries
from vllm_server.openai.prompts import encode_messages
from vllm_server.openai.run import Run, ask, make_run
from vllm_server.openai.schema import ChatRequest
from vllm_server.ops.events import EventStream
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.text.reasoning import Parts

_Run = Run[ChatRequest]


async def chat(call: Call) -> Reply | EventStream:
    """Answer a conversation."""
    asked = await ask(call, ChatRequest, "chat")
    service, request = asked.service, asked.request
    encoded = await encode_messages(
        call.state, service.tokenizer, service.card, request, asked.warnings
    )
    run = make_run(asked, [encoded], chat_choice)
    if request.stream:
        return EventStream(_stream(run), run.headers)
    return Reply(msgspec.json.encode(await _answer(run)), headers=run.headers)


async def _answer(run: _Run) -> dict[str, Any]:
    collected = [_Collected() for _ in run.choices]
    async with run.news() as news:
        async for index, delta in news:
            collected[index].add(delta)
    answer: dict[str, Any] = {
        **run.head("chat.completion"),
        "choices": [_choice(run, i, found) for i, found in enumerate(collected)],
        "usage": run.usage(),
        **_about_prompt(run),
    }
    if run.request.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_entries(collected[0].prompt_logprobs, run.names)
    return answer


class _Collected:
    """A choice of a plain answer."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: Sequence[TokenLogprobs | None] = ()

    def add(self, delta: Delta) -> None:
        """Take news."""
        self.reasoning.append(delta.parts.reasoning)
        self.content.append(delta.parts.content)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


def _choice(run: _Run, index: int, found: _Collected) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(found.content),
        "refusal": None,
    }
    reasoning = "".join(found.reasoning)
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = reasoning
    choice = run.choices[index]
    return {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.answer.stop_reason,
        **_extra(run, found.logprobs, found.token_ids),
    }


def _extra(
    run: _Run, logprobs: Sequence[TokenLogprobs], token_ids: Sequence[int]
) -> dict[str, Any]:
    """Members of a choice that were asked for."""
    found: dict[str, Any] = {}
    if run.request.logprobs:
        found["logprobs"] = {"content": chat_entries(logprobs, run.names), "refusal": None}
    if run.request.return_token_ids:
        found["token_ids"] = token_ids
    return found


def _about_prompt(run: _Run) -> dict[str, Any]:
    """Members of the answer that were asked for."""
    found: dict[str, Any] = {}
    [prompt] = run.prompts
    if run.request.return_token_ids:
        found["prompt_token_ids"] = prompt.ids
    if run.request.return_prompt_text:
        tokenizer = run.service.tokenizer
        found["prompt_text"] = prompt.text or tokenizer.decode(prompt.ids, False)
    return found


async def _stream(run: _Run) -> AsyncGenerator[bytes, None]:
    chunks = run.chunks("chat.completion.chunk")
    begun: set[int] = set()
    async with run.news() as news:
        async for index, delta in news:
            usage = run.running_usage()
            events = _events(run, chunks, index, delta, usage)
            if index not in begun:
                begun.add(index)
                events.insert(0, chunks.choice(chat_first(index, {}), usage, _about_prompt(run)))
            if events:
                yield b"".join(events)
    if run.has_usage:
        yield chunks.usage(run.usage())


def _events(
    run: _Run, chunks: Chunks, index: int, delta: Delta, usage: Mapping[str, Any] | None
) -> list[bytes]:
    events: list[bytes] = []
    extra = _extra(run, delta.logprobs, delta.token_ids)
    if delta.parts != Parts() or (extra and (delta.logprobs or run.request.return_token_ids)):
        events.append(chunks.choice(chat_delta(index, delta.parts, extra), usage))
    if delta.is_final:
        choice = run.choices[index]
        finish = chat_finish(index, choice.finish_reason, choice.answer.stop_reason)
        events.append(chunks.choice(finish, usage))
    return events
