"""What every route of the API does with a call: find the model, decode, validate, name, warn."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any, TypeVar

from vllm_server.openai.errors import unavailable
from vllm_server.openai.json_body import decode_object
from vllm_server.openai.schema import Body
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
