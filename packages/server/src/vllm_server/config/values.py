"""Turns what a source says into the value of a setting, or says why it cannot be one.

Knows types, ranges and words; deliberately not where the text came from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from vllm_server.config.fields import Field
from vllm_server.config.names import nearest

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SIZE = re.compile(r"([+-]?\d+(?:\.\d+)?)([kKmMgGtT]?)(?:i?[bB])?")
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def convert(field: Field, raw: object) -> Any:
    """The setting's value for what a source gave: text from a flag or variable, anything from YAML.

    Raises:
        ValueError: The value has another type or lies outside the range; says what is allowed.
    """
    if raw is None and field.optional:
        return None
    match field.kind:
        case "bool":
            value: Any = _bool(raw)
        case "int":
            value = _int(raw)
        case "float":
            value = _float(raw)
        case "text":
            value = _text(raw)
        case "texts":
            value = tuple(_text(item) for item in _items(raw))
        case "keys":
            value = tuple(_key(item) for item in _items(raw))
    _check_choice(field, value)
    _check_range(field, value)
    return value


def _bool(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word in _TRUE | _FALSE:
        return word in _TRUE
    raise ValueError("must be true or false")


def _int(raw: object) -> int:
    """Plain digits or a size: `4k` is 4000, `4K` is 4096, `2G` is 2 * 1024**3."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    found = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if found is None:
        raise ValueError("must be a whole number, such as 512, 4k (4000) or 4K (4096)")
    digits, unit = found.groups()
    number = float(digits) * (1000 if unit.islower() else 1024) ** _POWERS[unit.lower()]
    if number != int(number):
        raise ValueError("must be a whole number")
    return int(digits) if not unit and "." not in digits else int(number)


def _float(raw: object) -> float:
    try:
        number = math.nan if isinstance(raw, bool) else float(cast("str | float", raw))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _text(raw: object) -> str:
    if isinstance(raw, str):
        return raw
    raise ValueError("must be text; put it in quotes")


def _items(raw: object) -> Iterable[object]:
    """A list from YAML, or text with commas between the items."""
    if isinstance(raw, str):
        return [item.strip() for item in raw.split(",") if item.strip()]
    if isinstance(raw, (list, tuple)):
        return cast("Iterable[object]", raw)
    raise ValueError("must be a list")


_KEY_PARTS = ("name", "key", "scopes", "limits")


def _key(raw: object) -> str | Mapping[str, Any]:
    """One API key: text, or a mapping with at least `key`."""
    if isinstance(raw, str) and raw:
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError("each key must be text or a mapping with name, key, scopes and limits")
    entry = cast("Mapping[str, Any]", raw)
    for part in entry:
        if part not in _KEY_PARTS:
            raise ValueError(f"a key has no part {part!r}{nearest(str(part), _KEY_PARTS)}")
    if not isinstance(entry.get("key"), str):
        raise ValueError("a key's mapping needs `key`, as text")
    return dict(entry)


def _check_choice(field: Field, value: Any) -> None:
    if not field.choices or str(value) in field.choices:
        return
    raise ValueError(
        f"must be one of {', '.join(field.choices)}{nearest(str(value), field.choices)}"
    )


def _check_range(field: Field, value: Any) -> None:
    if field.kind not in ("int", "float"):
        return
    too_low = field.low is not None and value < field.low
    too_high = field.high is not None and value > field.high
    if too_low or too_high:
        raise ValueError(f"must be {limits(field)}")


def limits(field: Field) -> str:
    """The allowed range in words, empty without one."""
    words: list[str] = []
    if field.low is not None:
        words.append(f"at least {_plain(field.low)}")
    if field.high is not None:
        words.append(f"at most {_plain(field.high)}")
    return " and ".join(words)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"
