"""`/v1/completions`, plain and streamed, with echo and scoring."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm_traits import TokenLogprobs

from vllm_server.openai.choice import Choice, Delta, completion_choice, usage_of
from vllm_server.openai.chunks import Chunks, completion_delta
from vllm_server.openai.deltas import deltas
from vllm_server.openai.generation import Plan
from vllm_server.openai.logprobs import CompletionLogprobs, TokenNames, prompt_entries
from vllm_server.openai.prompts import Encoded, encode_prompts
from vllm_server.openai.requests import cut_prompts, make_plan, read, service_of, warning_headers
from vllm_server.openai.sampling import check_model, check_stream, sampling_params
from vllm_server.openai.schema import CompletionRequest
from vllm_server.ops.events import EventStream
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.service import Service


@dataclass(frozen=True)
class _Run:
    """Everything one request needs while it runs."""

    call: Call
    service: Service
    request: CompletionRequest
    model: str
    prompts: Sequence[Encoded]
    plan: Plan
    choices: Sequence[Choice]
    names: TokenNames

    def prompt(self, index: int) -> Encoded:
        """The prompt of a choice."""
        return self.prompts[index // self.plan.n]


async def completions(call: Call) -> Reply | EventStream:
    """Continue texts."""
    service = service_of(call)
    warnings: list[str] = []
    request = await read(call, CompletionRequest, "completions", warnings)
    model = check_model(request.model, service.card)
    check_stream(request)
    params = sampling_params(request, service, call.state.settings)
    encoded = await encode_prompts(
        call.state,
        service.tokenizer,
        service.card,
        request.prompt,
        request.add_special_tokens,
        "prompt",
    )
    prompts = cut_prompts(encoded, request, service)
    plan = make_plan(call, service, request, params, prompts)
    choices = [completion_choice(request, service, p) for p in prompts for _ in range(plan.n)]
    names = TokenNames(service.tokenizer, request.return_tokens_as_token_ids)
    run = _Run(call, service, request, model, prompts, plan, choices, names)
    headers = warning_headers(warnings)
    if request.stream:
        return EventStream(_stream(run), headers)
    return Reply(msgspec.json.encode(await _answer(run)), headers=headers)


async def _answer(run: _Run) -> dict[str, Any]:
    collected = [_Part(run, i) for i in range(len(run.choices))]
    texts: list[list[str]] = [[] for _ in run.choices]
    members: list[dict[str, Any]] = [{} for _ in run.choices]
    async with aclosing(deltas(run.call, run.service, run.plan, run.choices)) as news:
        async for index, delta in news:
            text, extra = collected[index].take(delta)
            texts[index].append(text)
            _merge(members[index], extra)
    return {
        "id": run.plan.id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": run.model,
        "system_fingerprint": run.service.card.fingerprint,
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
        "usage": usage_of(run.choices, run.plan.n).body(),
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
        self._job = run
        self._prompt = run.prompt(index)
        self._is_first = True
        wanted = run.request.logprobs
        self._logprobs = None if wanted is None else CompletionLogprobs(run.names, wanted)

    def take(self, delta: Delta) -> tuple[str, dict[str, Any]]:
        """New text, and the members of the choice that were asked for."""
        request = self._job.request
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
        request, found = self._job.request, dict[str, Any]()
        if request.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_entries(delta.prompt_logprobs, self._job.names)
        if request.return_token_ids:
            found["prompt_token_ids"] = self._prompt.ids
        if request.return_prompt_text:
            found["prompt_text"] = self._prompt_text()
        return found

    def _prompt_text(self) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._job.service.tokenizer.decode(
            self._prompt.ids, self._job.request.skip_special_tokens
        )


def _zipped(
    ids: Sequence[int], entries: Sequence[TokenLogprobs]
) -> list[tuple[int, TokenLogprobs | None]]:
    return list(zip(ids, entries, strict=False))


async def _stream(run: _Run) -> AsyncGenerator[bytes, None]:
    options = run.request.stream_options
    with_usage = options is not None and options.include_usage
    continuous = options is not None and options.continuous_usage_stats
    card = run.service.card
    chunks = Chunks(run.plan.id, "text_completion", run.model, card.fingerprint, with_usage)
    parts = [_Part(run, index) for index in range(len(run.choices))]
    async with aclosing(deltas(run.call, run.service, run.plan, run.choices)) as news:
        async for index, delta in news:
            text, extra = parts[index].take(delta)
            choice = run.choices[index]
            if delta.is_final:
                extra["finish_reason"] = choice.finish_reason
                extra["stop_reason"] = choice.answer.stop_reason
            if text or extra:
                usage = usage_of(run.choices, run.plan.n).body() if continuous else None
                yield chunks.choice(completion_delta(index, text, extra), usage)
    if with_usage:
        yield chunks.usage(usage_of(run.choices, run.plan.n).body())
