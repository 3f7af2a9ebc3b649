"""The one validator: a decoded body becomes a request, or an error that says where and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vllm_server.openai.errors import (
    MAX_ECHO,
    MAX_FIELD_ERRORS,
    ApiError,
    echo,
    invalid,
    unsupported,
)
from vllm_server.openai.policy import ALIASES, IDLE, refusal_of
from vllm_server.openai.schema import Body

Model = TypeVar("Model", bound=Body)

_OWN_CODES = frozenset({"unsupported_content"})
_MAX_WARNED = 10


class Unknown(NamedTuple):
    """Parameters nobody knows, for the warning header and the log."""

    names: tuple[str, ...] = ()


def validate(
    model: type[Model], route: str, body: Mapping[str, Any], strict_names: bool = False
) -> tuple[Model, Unknown]:
    """The request that a body describes.

    Args:
        model: What the route takes.
        route: Name of the route in `vllm_server.openai.policy`.
        body: A decoded JSON object; null means absent.
        strict_names: Refuse unknown names.

    Raises:
        ApiError: 400 with the dotted path of the first offending field.
    """
    given = _canonical(model, {name: value for name, value in body.items() if value is not None})
    _refuse(model, route, given)
    unknown = tuple(n for n in given if n not in model.model_fields and n not in IDLE)
    unknown = tuple(n for n in unknown if not _is_neutral(route, n))
    if unknown and strict_names:
        raise ApiError(
            400,
            "unknown_parameter",
            f"The parameter {echo(unknown[0])} is unknown.",
            unknown[0][:MAX_ECHO],
        )
    try:
        found = model.model_validate(given)
    except ValidationError as error:
        raise _located(error) from None
    return found, Unknown(unknown[:_MAX_WARNED])


def _canonical(model: type[Body], given: dict[str, Any]) -> dict[str, Any]:
    """Other names of a field become its own; two different values are a contradiction."""
    for alias, name in ALIASES.items():
        if alias not in given or name not in model.model_fields:
            continue
        value = given.pop(alias)
        if name in given and given[name] != value:
            raise invalid(f"`{alias}` and `{name}` are the same parameter; give one.", alias)
        given[name] = value
    return given


def _refuse(model: type[Body], route: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in model.model_fields:
            reason = refusal_of(route, name, value)
            if reason is not None:
                raise unsupported(name, reason)


def _is_neutral(route: str, name: str) -> bool:
    return refusal_of(route, name, _ASKS) is not None


_ASKS = object()


def _located(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=True)[:MAX_FIELD_ERRORS]
    first = found[0]
    code = "invalid_value"
    if first["type"] == "missing":
        code = "missing_field"
    elif first["type"] in _OWN_CODES:
        code = first["type"]
    message = " ".join(_sentence(each) for each in found)
    return ApiError(400, code, message, _path(first))


def _sentence(error: ErrorDetails) -> str:
    path = _path(error)
    if error["type"] == "missing":
        return f"`{path}` is required."
    words = error["msg"].rstrip(".")
    if error["type"] in ("invalid_value", *_OWN_CODES):
        return f"`{path}`: {words}."
    given = error["input"]
    shown = "" if isinstance(given, (dict, list)) else f", not {echo(given)}"
    return f"`{path}`: {words[:1].lower()}{words[1:]}{shown}."


def _path(error: ErrorDetails) -> str:
    """Dotted path of names and indices; the tags of unions are not part of it."""
    return ".".join(str(part)[:100] for part in error["loc"])
