"""Text to token ids and back, from the files of a model folder.

Knows `tokenizer.json`, `tokenizer_config.json` and the places where a chat template may be. Does
not know requests, streams or the model's own end-of-sequence ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
from vllm_traits import InvalidRequestError, ModelError

from vllm_server.text.chat_template import ChatTemplate
from vllm_server.text.detokenize import Detokenizer, decode
from vllm_server.text.pieces import pieces_of

MAX_FILE_BYTES = 256 * 1024 * 1024


class Tokenizer:
    """The tokenizer of one model.

    Args:
        folder: Model folder with a `tokenizer.json`.
        chat_template: Source of a template that replaces the model's own.

    Attributes:
        vocab_size: Largest token id of the tokenizer plus one; the logits may be wider.
        bos_token: Text of the beginning-of-sequence token, or None.
        eos_token: Text of the end-of-sequence token, or None.
        chat_template: The compiled template, or None if the model has none.

    Raises:
        ModelError: A file is missing or cannot be used; says which and why.
    """

    def __init__(self, folder: Path | str, chat_template: str | None = None) -> None:
        folder = Path(folder)
        self._source = _load(folder / "tokenizer.json")
        try:
            self.pieces = pieces_of(self._source)
        except ValueError as error:
            raise ModelError(f"{folder / 'tokenizer.json'}: {error}.") from None
        config = _read_json(folder / "tokenizer_config.json")
        tokens = {**_read_json(folder / "special_tokens_map.json"), **config}
        self.bos_token = _token_text(tokens.get("bos_token"))
        self.eos_token = _token_text(tokens.get("eos_token"))
        self.vocab_size = max(self._source.get_vocab(True).values(), default=-1) + 1
        source = chat_template or _find_template(folder, config)
        self.chat_template = (
            None if source is None else ChatTemplate(source, self.bos_token, self.eos_token)
        )

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self.token_id(self.eos_token)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        return self.pieces.special_ids

    def token_id(self, token: str | None) -> int | None:
        """The id of a token given by its text in the vocabulary."""
        return None if token is None else self._source.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any text without lone surrogates.
            add_special_tokens: Add what the model expects around a text, such as the
                beginning-of-sequence token.
        """
        # The call for batches lets other threads run meanwhile; the one for a single text does not.
        [found] = self._source.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return found.ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary have none."""
        return decode(self.pieces, token_ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text."""
        return self.pieces[token_id]

    def detokenizer(
        self,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        keep_ids: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """A new stream of text that follows `prompt_ids`; `keep_ids` are never left out."""
        return Detokenizer(self.pieces, prompt_ids, skip_special_tokens, keep_ids)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: Mappings with at least `role` and `content`.
            add_generation_prompt: End with the beginning of the assistant's answer.
            variables: Further variables of the template, such as `enable_thinking`.

        Raises:
            InvalidRequestError: The model has no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions, or start the server with "
                "--chat-template.",
                code="invalid_messages",
                param="messages",
            )
        return self.chat_template.render(messages, add_generation_prompt, variables)


def _load(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ModelError(
            f"{path} does not exist. A model folder needs a tokenizer.json; convert an older "
            "tokenizer with its own library and save it there."
        )
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
    try:
        source = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise ModelError(f"{path} is not a tokenizer: {str(error)[:200]}") from None
    source.no_truncation()
    source.no_padding()
    return source


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ModelError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{path} is not valid JSON.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold an object.")
    return cast("dict[str, Any]", found)


def _token_text(entry: Any) -> str | None:
    """A special token is written as text or as an object with `content`."""
    if isinstance(entry, dict):
        entry = cast("dict[str, Any]", entry).get("content")
    return entry if isinstance(entry, str) else None


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB.")
        return path.read_text("utf-8")
    found = config.get("chat_template")
    if found is None:
        found = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in cast("list[Any]", found)}
        found = named.get("default")
    return found if isinstance(found, str) else None
