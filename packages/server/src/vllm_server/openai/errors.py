"""Every error of the HTTP API: one type, one table of statuses, one renderer.

A message always comes from the project's own tables and checks, never from a foreign exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from vllm_traits import (
    BackendError,
    ContextLengthError,
    InvalidRequestError,
    QueueFullError,
)

MAX_FIELD_ERRORS = 10
MAX_ECHO = 200

TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    501: "not_supported_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status, a key of `TYPES`.
        code: Stable word for programs.
        message: What is wrong and what to do.
        param: Dotted path of the offending field, or None.
        headers: Further response headers.
        extra: Further members of the error object.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Sequence[tuple[str, str]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        error = {
            "message": self.message,
            "type": TYPES[self.status],
            "param": self.param,
            "code": self.code,
            **self.extra,
        }
        return {"error": error}

    def encoded(self) -> bytes:
        """The body as JSON."""
        return msgspec.json.encode(self.body)


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that is wrong as it stands."""
    return ApiError(400, code, message, param)


def unsupported(name: str, reason: str) -> ApiError:
    """A parameter that is known and refused."""
    return ApiError(400, "unsupported_parameter", f"`{name[:MAX_ECHO]}` {reason}", name[:MAX_ECHO])


def model_not_found(name: str, served: Sequence[str]) -> ApiError:
    """A model that is not served."""
    known = ", ".join(served)
    message = f"The model {echo(name)} does not exist; this server has: {known}."
    return ApiError(404, "model_not_found", message, "model")


def unavailable(code: str, message: str, retry_after: int = 1) -> ApiError:
    """A server that cannot take the request now."""
    return ApiError(503, code, message, headers=[("retry-after", str(retry_after))])


def overloaded() -> ApiError:
    """A full queue."""
    return unavailable("server_overloaded", "The server's queue is full; try again later.")


def internal_error() -> ApiError:
    """A fault of ours in one request."""
    return ApiError(
        500, "internal_error", "An internal error ended this request; it is in the server's log."
    )


def too_long(num_prompt_tokens: int, max_model_len: int, param: str, detail: str = "") -> ApiError:
    """A prompt that does not fit, in the words that clients look for."""
    detail = detail or f"the prompt has {num_prompt_tokens} tokens"
    return ApiError(
        400,
        "context_length_exceeded",
        f"This model's maximum context length is {max_model_len} tokens, but {detail}. "
        "Shorten the prompt.",
        param,
        extra={"n_prompt_tokens": num_prompt_tokens, "n_ctx": max_model_len},
    )


def echo(value: object) -> str:
    """Client text as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 3] + "..."


def from_engine(error: Exception, prompt_param: str = "prompt") -> ApiError:
    """The answer for an error that the engine raised on purpose.

    Args:
        error: One of `vllm_traits.errors`.
        prompt_param: Name of the field that holds the prompt on this route.
    """
    match error:
        case ContextLengthError():
            return too_long(error.num_prompt_tokens, error.max_model_len, prompt_param)
        case InvalidRequestError():
            param = prompt_param if error.param in ("prompt", "token_ids") else error.param
            return ApiError(400, error.code, str(error), param)
        case QueueFullError():
            return overloaded()
        case BackendError():
            return unavailable("engine_unavailable", "The engine is restarting; try again later.")
        case _:
            return internal_error()


def from_output(code: str | None) -> ApiError:
    """The answer for a request that ended with finish reason `error`."""
    if code in ("server_overloaded", "queue_timeout"):
        return overloaded()
    if code == "engine_unavailable":
        return unavailable(code, "The engine is restarting; try again later.")
    return internal_error()
