"""`/health` and its relatives, `/version`, `/load`, `/shutdown`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from vllm_server.openai.errors import ApiError
from vllm_server.openai.json_body import decode_object
from vllm_server.openai.schema import ShutdownRequest
from vllm_server.openai.validate import validate
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.service import Phase, ServerState

STALLED_SECONDS = 10.0

_REASONS = {
    "loading": ("loading", "The model is being loaded."),
    "draining": ("draining", "The server is shutting down."),
    "dead": ("engine_unavailable", "The engine makes no progress."),
}


def phase_of(state: ServerState) -> Phase:
    """The state of the server, as its engine's progress proves it."""
    if state.service is None or state.phase == "dead":
        return state.phase
    health = state.service.engine.health()
    if health.status != "ok" or health.stalled_s >= STALLED_SECONDS:
        return "dead"
    return state.phase


async def health(call: Call) -> Reply:
    """200 while work is accepted and makes progress, else 503 with the reason.

    With 200 comes what is known about the model's results.
    """
    phase = phase_of(call.state)
    if phase == "ready":
        service = call.state.service
        findings = service.findings if service else None
        details = findings.details() if findings else {}
        return Reply(msgspec.json.encode({"status": "ok", **details}))
    code, message = _REASONS[phase]
    body: dict[str, Any] = {"status": phase, **ApiError(503, code, message).body}
    if phase == "loading":
        body["progress"] = round(call.state.progress, 4)
    return Reply(msgspec.json.encode(body), 503, [("retry-after", "5")])


async def live(call: Call) -> Reply:
    """The process answers."""
    return Reply(b'{"status":"ok"}')


def project_version() -> str:
    """Version of this distribution."""
    try:
        return version("vllm-server")
    except PackageNotFoundError:
        return "unknown"


async def show_version(call: Call) -> Reply:
    """Version of the server."""
    return Reply(msgspec.json.encode({"version": project_version()}))


async def load(call: Call) -> Reply:
    """Requests running and waiting."""
    service = call.state.service
    num = 0
    if service is not None:
        stats = service.engine.snapshot()
        num = stats.num_running + stats.num_waiting
    return Reply(msgspec.json.encode({"server_load": num}))


async def shutdown(call: Call) -> Reply:
    """Begin to end the server; the guard of the route has let the caller in."""
    state = call.state
    request = ShutdownRequest()
    if call.body:
        request, _ = validate(ShutdownRequest, "shutdown", decode_object(call.body), True)
    seconds = state.settings.server.shutdown_timeout_secs
    if request.timeout_s is not None:
        seconds = request.timeout_s
    state.start_drain()
    state.request_shutdown(request.mode, seconds)
    status = 200 if call.exchange.method == "GET" else 202
    body = {"status": "shutting_down", "mode": request.mode, "timeout_s": seconds}
    return Reply(msgspec.json.encode(body), status)
