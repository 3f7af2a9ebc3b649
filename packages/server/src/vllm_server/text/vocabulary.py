"""What a model's text side is made of, and how it is read from a folder's files.

Knows `tokenizer.json`, `tokenizer_config.json` and the places where a chat template may be. Does
not know requests, streams or the model's own end-of-sequence ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import tokenizers
from vllm_traits import ModelError

MAX_FILE_BYTES = 256 * 1024 * 1024


class Vocabulary(NamedTuple):
    """What a folder or a file says about text.

    Attributes:
        source: Text to ids.
        bos_token: Text of the beginning-of-sequence token, or None.
        eos_token: Text of the end-of-sequence token, or None.
        template: Source of the chat template, or None.
        path: The file with the tokens, for messages.
    """

    source: tokenizers.Tokenizer
    bos_token: str | None
    eos_token: str | None
    template: str | None
    path: Path


def read_folder(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder with a `tokenizer.json`.

    Raises:
        ModelError: A file is missing or cannot be used; says which and why.
    """
    path = folder / "tokenizer.json"
    source = _load(path)
    config = read_json(folder / "tokenizer_config.json")
    tokens = {**read_json(folder / "special_tokens_map.json"), **config}
    return Vocabulary(
        source,
        token_text(tokens.get("bos_token")),
        token_text(tokens.get("eos_token")),
        find_template(folder, config),
        path,
    )


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist. A model folder needs a tokenizer.json; convert an older "
            "tokenizer with its own library and save it there."
        )
    _check_size(path)
    try:
        source = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise ModelError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
    source.no_truncation()
    source.no_padding()
    return source


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an absent file is an empty object.

    Raises:
        ModelError: It is too large, or no JSON object.
    """
    if not path.is_file():
        return {}
    _check_size(path)
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not valid JSON.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold an object.")
    return cast("dict[str, Any]", found)


def token_text(entry: Any) -> str | None:
    """A special token is written as text or as an object with `content`."""
    if isinstance(entry, dict):
        entry = cast("dict[str, Any]", entry).get("content")
    return entry if isinstance(entry, str) else None


def find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Source of the chat template of a folder.

    Args:
        folder: Where it may be in a file of its own.
        config: What `tokenizer_config.json` holds.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        _check_size(path)
        return path.read_text("utf-8")
    found = config.get("chat_template")
    if found is None:
        found = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in cast("list[Any]", found)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
