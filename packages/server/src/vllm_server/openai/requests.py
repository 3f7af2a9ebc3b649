"""What chat and plain completions do alike before anything runs: decode, validate, plan."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from vllm_traits import SamplingParams

from vllm_server.openai.errors import invalid, unavailable
from vllm_server.openai.generation import Plan
from vllm_server.openai.json_body import decode_object
from vllm_server.openai.prompts import Encoded, truncated
from vllm_server.openai.sampling import check_priority, max_new_tokens
from vllm_server.openai.schema import Body, ChatRequest, CompletionRequest
from vllm_server.openai.validate import validate
from vllm_server.ops.routes import Call
from vllm_server.service import Service

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=Body)

LARGE_BODY = 256 * 1024


async def read(call: Call, model: type[Model], route: str, warnings: list[str]) -> Model:
    """The request in a call's body; a large one is decoded off the event loop.

    Args:
        call: The call.
        model: What the route takes.
        route: Name of the route in the policy tables.
        warnings: Gets the names of unknown parameters.

    Raises:
        ApiError: 400.
    """
    strict_names = call.state.settings.server.strict_params

    def work() -> tuple[Model, Any]:
        return validate(model, route, decode_object(call.body), strict_names)

    if len(call.body) > LARGE_BODY:
        request, unknown = await call.state.in_thread(work)
    else:
        request, unknown = work()
    warnings.extend(unknown.names)
    return request


def warning_headers(warnings: Sequence[str]) -> list[tuple[str, str]]:
    """The header that names parameters without effect, and one log line."""
    if not warnings:
        return []
    names = ", ".join(name.encode("ascii", "replace").decode()[:64] for name in warnings[:10])
    names = "".join(c if c.isprintable() else "?" for c in names)
    log.info("unknown parameters: %s", names)
    return [("x-vllm-lite-warning", f"ignored unknown parameters: {names}")]


def service_of(call: Call) -> Service:
    """The loaded model; the pipeline lets no work through before it is there."""
    service = call.state.service
    if service is None:
        raise unavailable("loading", "The model is being loaded; try again later.", 5)
    return service


def unique_id(call: Call) -> str:
    """The exchange's id; one that the client chose may come twice and gets a random end."""
    own = "" if call.exchange.has_random_id else f"-{secrets.token_hex(4)}"
    return call.exchange.id + own


def make_plan(
    call: Call,
    service: Service,
    request: ChatRequest | CompletionRequest,
    params: SamplingParams,
    prompts: Sequence[Encoded],
) -> Plan:
    """What to run for a request whose prompts are encoded.

    Raises:
        ApiError: 400.
    """
    settings = call.state.settings
    num_choices = len(prompts) * request.n
    if num_choices > settings.server.max_num_queued_reqs:
        raise invalid(
            f"{len(prompts)} prompts of {request.n} choices are {num_choices} sequences, more "
            f"than the {settings.server.max_num_queued_reqs} that may wait.",
            "n",
        )
    ceiling = settings.engine.max_tokens
    return Plan(
        id=_public_id(call, request),
        prompts=[p.ids for p in prompts],
        params=[
            replace(params, max_tokens=max_new_tokens(request, len(p.ids), service.card, ceiling))
            for p in prompts
        ],
        n=request.n,
        priority=check_priority(request.priority, _priority_header(call)),
        salt=call.state.salt(call.identity, request.cache_salt),
        session_id=_session(call, request),
        prompt_param="messages" if isinstance(request, ChatRequest) else "prompt",
    )


def cut_prompts(
    prompts: Sequence[Encoded], request: ChatRequest | CompletionRequest, service: Service
) -> list[Encoded]:
    """Prompts cut as asked, and never empty.

    Raises:
        ApiError: 400.
    """
    limit = service.card.max_model_len - 1
    cut = [_cut(p, truncated(p.ids, request, limit)) for p in prompts]
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
