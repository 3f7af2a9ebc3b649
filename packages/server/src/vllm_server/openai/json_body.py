"""Strict JSON: the one function that turns a request body into Python values.

Refuses what `json` lets through: NaN and Infinity, numbers that overflow, duplicate keys, lone
surrogates and deep nesting.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, cast

from vllm_server.openai.errors import ApiError

MAX_DEPTH = 64

_SURROGATE = re.compile("[\ud800-\udfff]")


class _NotStrictError(ValueError):
    """JSON that the standard library takes and we do not."""


def decode_object(body: bytes) -> dict[str, Any]:
    """The object that a request body holds.

    Raises:
        ApiError: 400 `invalid_json`, saying what is wrong.
    """
    try:
        value = _DECODER.decode(body.decode("utf-8"))
        _check_depth(body, value)
        _check_text(body, value)
    except _NotStrictError as error:
        raise _invalid(str(error)) from None
    except UnicodeDecodeError as error:
        raise _invalid(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise _invalid(f"it nests deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise _invalid("a number has too many digits") from None
    if not isinstance(value, dict):
        raise _invalid("it must be an object")
    return cast("dict[str, Any]", value)


def _invalid(reason: str) -> ApiError:
    return ApiError(400, "invalid_json", f"The request body is not valid JSON: {reason}.")


def _refuse_constant(name: str) -> NoReturn:
    raise _NotStrictError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NotStrictError("a number is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _NotStrictError(f"the key {twice[:100]!a} appears twice")
    return found


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
)


def _check_depth(body: bytes, value: Any) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _containers(outer)]
        if not level:
            return
    raise _NotStrictError(f"it nests deeper than {MAX_DEPTH} levels")


def _containers(value: Any) -> list[Any]:
    items = value.values() if isinstance(value, dict) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return [item for item in items if isinstance(item, (dict, list))]  # pyright: ignore[reportUnknownVariableType]


def _check_text(body: bytes, value: Any) -> None:
    """Only an escape such as `\\ud800` can bring a lone surrogate into UTF-8 text."""
    if b"\\u" not in body:
        return
    if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise _NotStrictError("a string has a lone surrogate")
