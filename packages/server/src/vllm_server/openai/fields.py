"""Field types of request bodies that plain annotations cannot say: prompts, stops, contents.

Each turns the many shapes a client may send into one, or names what is wrong. Knows nothing of
limits that depend on the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_PROMPTS = 1024
MAX_INPUTS = 2048
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_IDS = 1024
MAX_BAD_WORDS = 256

Prompt = str | tuple[int, ...]


def wrong(message: str, code: str = "invalid_value") -> PydanticCustomError:
    """What a validator raises; the type of the error becomes the code of the answer."""
    return PydanticCustomError(cast("Any", code), cast("Any", message.replace("{", "{{")))


def is_int(value: object) -> bool:
    """Whether a JSON value is an integer; true is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(value: Sequence[Any], what: str) -> tuple[int, ...]:
    if not all(type(item) is int for item in value):
        raise wrong(f"{what} must hold token ids only")
    if min(value) < 0 or max(value) >= 2**31:
        raise wrong(f"{what} has a token id outside of the vocabulary")
    return tuple(cast("Sequence[int]", value))


def _prompts(value: Any, limit: int, mixed: bool) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_text(value, "it"),)
    if not isinstance(value, list):
        raise wrong("it must be a string, a list of strings, or a list of token ids")
    items = cast("list[Any]", value)
    if not items:
        raise wrong("the list is empty")
    if is_int(items[0]):
        return (_ids(items, "the list"),)
    if len(items) > limit:
        raise wrong(f"the list has {len(items)} entries, more than {limit}")
    found = tuple(_prompt(item, at) for at, item in enumerate(items))
    if not mixed and len({type(item) for item in found}) > 1:
        raise wrong("the list mixes strings and lists of token ids")
    return found


def _prompt(item: Any, at: int) -> Prompt:
    if isinstance(item, str):
        return _text(item, f"entry {at}")
    if not isinstance(item, list):
        raise wrong(f"entry {at} must be a string or a list of token ids")
    if not item:
        raise wrong(f"entry {at} is an empty list")
    return _ids(cast("list[Any]", item), f"entry {at}")


def _text(text: str, what: str) -> str:
    if not text:
        raise wrong(f"{what} is empty")
    return text


def _read_prompt(value: Any) -> tuple[Prompt, ...]:
    return _prompts(value, MAX_PROMPTS, mixed=False)


def _read_input(value: Any) -> tuple[Prompt, ...]:
    return _prompts(value, MAX_INPUTS, mixed=True)


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong("it must be a string or a list of strings")
    items = cast("list[Any]", stops)
    if len(items) > MAX_STOPS:
        raise wrong(f"it has {len(items)} stop strings, more than {MAX_STOPS}")
    for item in items:
        if not isinstance(item, str) or not item:
            raise wrong("every stop string must be a non-empty string")
        if len(item) > MAX_STOP_CHARS:
            raise wrong(f"a stop string is longer than {MAX_STOP_CHARS} characters")
    return tuple(items)


_ID_TEXT = re.compile(r"\d{1,10}")


def _read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise wrong("it must be an object of token ids and numbers")
    entries = cast("dict[str, Any]", value)
    if len(entries) > MAX_BIASES:
        raise wrong(f"it has {len(entries)} entries, more than {MAX_BIASES}")
    return tuple(_bias(key, number) for key, number in entries.items())


def _bias(key: str, number: Any) -> tuple[int, float]:
    if not _ID_TEXT.fullmatch(key, 0) or not key.isascii():
        raise wrong(f"the key {key[:50]!r} is not a token id")
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise wrong(f"the value of {key} must be a number")
    return int(key), float(max(-100, min(100, number)))


def _read_id_list(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong("it must be a list of token ids")
    items = cast("list[Any]", value)
    if not items:
        raise wrong("the list is empty")
    return _ids(items, "it")


def _read_stop_ids(value: Any) -> tuple[int, ...]:
    if value == []:
        return ()
    ids = _read_id_list(value)
    if len(ids) > MAX_IDS:
        raise wrong(f"it has {len(ids)} ids, more than {MAX_IDS}")
    return ids


def _read_words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise wrong("it must be a list of strings")
    items = cast("list[Any]", value)
    if not 1 <= len(items) <= MAX_BAD_WORDS:
        raise wrong(f"it must have 1 to {MAX_BAD_WORDS} entries, not {len(items)}")
    if not all(isinstance(item, str) and item.strip() for item in items):
        raise wrong("every entry must be a non-empty string")
    return tuple(items)


def _read_content(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("it must be a string or a list of parts")
    parts = cast("list[Any]", value)
    if len(parts) > MAX_PROMPTS:
        raise wrong(f"it has {len(parts)} parts, more than {MAX_PROMPTS}")
    return "\n".join(_part_text(part, at) for at, part in enumerate(parts))


def _part_text(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise wrong(f"part {at} must be an object")
    entry = cast("dict[str, Any]", part)
    kind = entry.get("type")
    key = {"text": "text", "input_text": "text", "refusal": "refusal"}.get(
        kind if isinstance(kind, str) else ""
    )
    if key is None and isinstance(kind, str):
        raise wrong(f"part {at} is of type {kind[:50]!r}; only text is read", "unsupported_content")
    if key is None or not isinstance(entry.get(key), str):
        raise wrong(f"part {at} needs a `type` and its text")
    return entry[key]


_STRINGS = {"type": "array", "items": {"type": "string"}}
_INTEGERS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_LISTS = {"type": "array", "items": _INTEGERS}
_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}


def _shape(first: dict[str, Any], *others: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [first, *others]} if others else first)


_STRING = {"type": "string"}

PromptField = Annotated[
    tuple[Prompt, ...], PlainValidator(_read_prompt), _shape(_STRING, _STRINGS, _INTEGERS, _LISTS)
]
InputField = Annotated[
    tuple[Prompt, ...], PlainValidator(_read_input), _shape(_STRING, _STRINGS, _INTEGERS, _LISTS)
]
StopField = Annotated[tuple[str, ...], PlainValidator(_read_stop), _shape(_STRING, _STRINGS)]
BiasField = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(_read_bias),
    _shape({"type": "object", "additionalProperties": {"type": "number"}}),
]
IdsField = Annotated[tuple[int, ...], PlainValidator(_read_id_list), _shape(_INTEGERS)]
StopIdsField = Annotated[tuple[int, ...], PlainValidator(_read_stop_ids), _shape(_INTEGERS)]
WordsField = Annotated[tuple[str, ...], PlainValidator(_read_words), _shape(_STRINGS)]
ContentField = Annotated[
    str | None,
    PlainValidator(_read_content),
    _shape(_STRING, {"type": "array", "items": _PART}, {"type": "null"}),
]

Short = Annotated[str, Field(min_length=1, max_length=128)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
