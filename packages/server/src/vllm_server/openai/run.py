"""A request for chat or a completion: checked, planned, and while it runs.

What the two routes do alike. Knows neither how a prompt is encoded nor how an answer is laid out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from vllm_traits import SamplingParams

from vllm_server.openai.choice import Choice, Delta, usage_of
from vllm_server.openai.chunks import Chunks
from vllm_server.openai.deltas import deltas
from vllm_server.openai.errors import invalid
from vllm_server.openai.generation import Plan
from vllm_server.openai.logprobs import TokenNames
from vllm_server.openai.prompts import Encoded, truncated
from vllm_server.openai.requests import read, service_of, unique_id, warning_headers
from vllm_server.openai.sampling import (
    check_model,
    check_priority,
    check_stream,
    max_new_tokens,
    sampling_params,
)
from vllm_server.openai.schema import ChatRequest, CompletionRequest
from vllm_server.ops.routes import Call
from vllm_server.service import Service

log = logging.getLogger(__name__)

Generating = TypeVar("Generating", ChatRequest, CompletionRequest)


@dataclass(frozen=True)
class Asked(Generic[Generating]):
    """A valid request whose prompts are not encoded yet.

    Attributes:
        call: It came with.
        service: The model that answers.
        request: The body.
        model: The name an answer carries.
        params: Sampling, without the length.
        warnings: Names of parameters without effect; encoding may add to them.
    """

    call: Call
    service: Service
    request: Generating
    model: str
    params: SamplingParams
    warnings: list[str]


async def ask(call: Call, body: type[Generating], route: str) -> Asked[Generating]:
    """Read and check a call.

    Args:
        call: The call.
        body: What the route takes.
        route: Name of the route in the policy tables.

    Raises:
        ApiError: 400, 404 `model_not_found`, or 503 while the model is loading.
    """
    service = service_of(call)
    warnings: list[str] = []
    request = await read(call, body, route, warnings)
    model = check_model(request.model, service.card)
    check_stream(request)
    params = sampling_params(request, service, call.state.settings)
    return Asked(call, service, request, model, params, warnings)


@dataclass(frozen=True)
class Run(Generic[Generating]):
    """Everything one request needs while it runs.

    Attributes:
        asked: The request.
        prompts: Encoded and cut.
        plan: What the engine runs.
        choices: Of all prompts, `plan.n` for each.
        names: What tokens are called in the answer.
        headers: Of the answer.
    """

    asked: Asked[Generating]
    prompts: Sequence[Encoded]
    plan: Plan
    choices: Sequence[Choice]
    names: TokenNames
    headers: list[tuple[str, str]]

    @property
    def request(self) -> Generating:
        """What was asked for."""
        return self.asked.request

    @property
    def service(self) -> Service:
        """The model that answers."""
        return self.asked.service

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self.request.stream_options
        return options is not None and options.include_usage

    def prompt(self, index: int) -> Encoded:
        """The prompt of a choice."""
        return self.prompts[index // self.plan.n]

    def news(self) -> aclosing[AsyncGenerator[tuple[int, Delta], None]]:
        """Number and news of choices until all have ended; leaving the context ends them."""
        return aclosing(deltas(self.asked.call, self.service, self.plan, self.choices))

    def head(self, kind: str) -> dict[str, Any]:
        """The members with which an answer or a chunk of it begins; `kind` is its `object`."""
        return {
            "id": self.plan.id,
            "object": kind,
            "created": int(time.time()),
            "model": self.asked.model,
            "system_fingerprint": self.service.card.fingerprint,
        }

    def chunks(self, kind: str) -> Chunks:
        """The chunks of a streamed answer; `kind` is their `object`."""
        return Chunks(self.head(kind), self.has_usage)

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        return usage_of(self.choices, self.plan.n).body()

    def running_usage(self) -> dict[str, Any] | None:
        """Token counts so far, if every chunk of a stream is to have them."""
        options = self.request.stream_options
        return self.usage() if options is not None and options.continuous_usage_stats else None


def make_run(
    asked: Asked[Generating],
    prompts: Sequence[Encoded],
    make_choice: Callable[[Generating, Service, Encoded], Choice],
) -> Run[Generating]:
    """What to run for a request whose prompts are encoded; nothing runs yet.

    Raises:
        ApiError: 400.
    """
    prompts = _all_cut(prompts, asked)
    plan = _plan(asked, prompts)
    return Run(
        asked,
        prompts,
        plan,
        [make_choice(asked.request, asked.service, p) for p in prompts for _ in range(plan.n)],
        TokenNames(asked.service.tokenizer, asked.request.return_tokens_as_token_ids),
        warning_headers(asked.warnings),
    )


def _plan(asked: Asked[Generating], prompts: Sequence[Encoded]) -> Plan:
    call, request = asked.call, asked.request
    settings = call.state.settings
    num_choices = len(prompts) * request.n
    if num_choices > settings.server.max_num_queued_reqs:
        raise invalid(
            f"{len(prompts)} prompts of {request.n} choices are {num_choices} sequences, more "
            f"than the {settings.server.max_num_queued_reqs} that may wait.",
            "n",
        )
    card, ceiling = asked.service.card, settings.engine.max_tokens
    return Plan(
        id=_public_id(call, request),
        prompts=[p.ids for p in prompts],
        params=[
            replace(asked.params, max_tokens=max_new_tokens(request, len(p.ids), card, ceiling))
            for p in prompts
        ],
        n=request.n,
        priority=check_priority(request.priority, _priority_header(call)),
        salt=call.state.salt(call.identity, request.cache_salt),
        session_id=_session(call, request),
        prompt_param="messages" if isinstance(request, ChatRequest) else "prompt",
    )


def _all_cut(prompts: Sequence[Encoded], asked: Asked[Generating]) -> list[Encoded]:
    """Prompts cut as asked, and never empty."""
    limit = asked.service.card.max_model_len - 1
    cut = [_cut(p, truncated(p.ids, asked.request, limit)) for p in prompts]
    if not all(p.ids for p in cut):
        raise invalid("A prompt has no tokens.", "prompt")
    return cut


def _cut(prompt: Encoded, ids: tuple[int, ...]) -> Encoded:
    return prompt if len(ids) == len(prompt.ids) else replace(prompt, ids=ids, text=None)


def _public_id(call: Call, request: ChatRequest | CompletionRequest) -> str:
    kind = "chatcmpl-" if isinstance(request, ChatRequest) else "cmpl-"
    return kind + (request.request_id or unique_id(call))


def _priority_header(call: Call) -> bytes | None:
    exchange = call.exchange
    return exchange.header(b"x-priority") or exchange.header(b"x-vllm-priority")


def _session(call: Call, request: ChatRequest | CompletionRequest) -> str | None:
    header = (call.exchange.header(b"x-session-id") or b"").decode("latin-1")
    if len(header) > 128:
        raise invalid("The header X-Session-ID is longer than 128 characters.", "session_id")
    found = request.session_id or header or request.prompt_cache_key
    if not found:
        return None
    if not call.state.settings.engine.context_cache:
        log.debug("a session id without --context-cache relies on the prefix cache alone")
        return None
    return call.state.session(call.identity, found)
