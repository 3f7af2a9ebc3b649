"""`/v1/completions`, plain and streamed, with echo and scoring."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from vllm_traits import TokenLogprobs

from vllm_server.openai.choice import Delta, completion_choice
from vllm_server.openai.chunks import completion_delta
from vllm_server.openai.logprobs import CompletionLogprobs, prompt_entries
from vllm_server.openai.prompts import encode_prompts
from vllm_server.openai.run import Run, ask, make_run
from vllm_server.openai.schema import CompletionRequest
from vllm_server.ops.events import EventStream
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call

_Run = Run[CompletionRequest]


async def completions(call: Call) -> Reply | EventStream:
    """Continue texts."""
    asked = await ask(call, CompletionRequest, "completions")
    service, request = asked.service, asked.request
    encoded = await encode_prompts(
        call.state,
        service.tokenizer,
        service.card,
        request.prompt,
        request.add_special_tokens,
        "prompt",
    )
    run = make_run(asked, encoded, completion_choice)
    if request.stream:
        return EventStream(_stream(run), run.headers)
    return Reply(msgspec.json.encode(await _answer(run)), headers=run.headers)


async def _answer(run: _Run) -> dict[str, Any]:
    collected = [_Part(run, i) for i in range(len(run.choices))]
    texts: list[list[str]] = [[] for _ in run.choices]
    members: list[dict[str, Any]] = [{} for _ in run.choices]
    async with run.news() as news:
        async for index, delta in news:
            text, extra = collected[index].take(delta)
            texts[index].append(text)
            _merge(members[index], extra)
    return {
        **run.head("text_completion"),
        "choices": [
            {
                "index": index,
                "text": "".join(texts[index]),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.answer.stop_reason,
                **members[index],
            }
            for index, choice in enumerate(run.choices)
        ],
        "usage": run.usage(),
    }


def _merge(into: dict[str, Any], extra: dict[str, Any]) -> None:
    """Append the members of the next part of a choice."""
    for name, value in extra.items():
        if name == "logprobs" and name in into:
            for each, items in value.items():
                into[name][each].extend(items)
        elif name == "token_ids":
            into.setdefault(name, []).extend(value)
        else:
            into[name] = value


class _Part:
    """Turns the news of one choice into text and members, the prompt first if it is echoed."""

    def __init__(self, run: _Run, index: int) -> None:
        self._run = run
        self._prompt = run.prompt(index)
        self._is_first = True
        wanted = run.request.logprobs
        self._logprobs = None if wanted is None else CompletionLogprobs(run.names, wanted)

    def take(self, delta: Delta) -> tuple[str, dict[str, Any]]:
        """New text, and the members of the choice that were asked for."""
        request = self._run.request
        text, entries = delta.parts.content, _zipped(delta.token_ids, delta.logprobs)
        extra: dict[str, Any] = {}
        if self._is_first:
            self._is_first = False
            extra = self._about_prompt(delta)
            if request.echo:
                text = self._prompt_text() + text
                scored = delta.prompt_logprobs or [None] * len(self._prompt.ids)
                entries = [*zip(self._prompt.ids, scored, strict=True), *entries]
        if self._logprobs is not None and entries:
            extra["logprobs"] = self._logprobs.lists(entries)
        if request.return_token_ids:
            extra["token_ids"] = delta.token_ids
        return text, extra

    def _about_prompt(self, delta: Delta) -> dict[str, Any]:
        request, found = self._run.request, dict[str, Any]()
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_entries(delta.prompt_logprobs, self._run.names)
        if request.return_token_ids:
            found["prompt_token_ids"] = self._prompt.ids
        if request.return_prompt_text:
            found["prompt_text"] = self._prompt_text()
        return found

    def _prompt_text(self) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._run.service.tokenizer.decode(
            self._prompt.ids, self._run.request.skip_special_tokens
        )


def _zipped(
    ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> list[tuple[int, TokenLogprobs | None]]:
    return list(zip(ids, entries, strict=False))


async def _stream(run: _Run) -> AsyncGenerator[bytes, None]:
    chunks = run.chunks("text_completion")
    parts = [_Part(run, index) for index in range(len(run.choices))]
    async with run.news() as news:
        async for index, delta in news:
            text, extra = parts[index].take(delta)
            choice = run.choices[index]
            if delta.is_final:
                extra["finish_reason"] = choice.finish_reason
                extra["stop_reason"] = choice.answer.stop_reason
            if text or extra:
                yield chunks.choice(completion_delta(index, text, extra), run.running_usage())
    if run.has_usage:
        yield chunks.usage(run.usage())
