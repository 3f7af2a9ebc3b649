"""Text to token ids and back, and conversations to prompts, for one model.

Works the same from a folder and from a GGUF file. Does not know requests, streams or the model's
own end-of-sequence ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_models.gguf_files import is_gguf
from vllm_traits import InvalidRequestError, ModelError

from vllm_server.text.chat_template import ChatTemplate
from vllm_server.text.detokenize import Detokenizer, decode
from vllm_server.text.pieces import pieces_of
from vllm_server.text.vocabulary import Vocabulary, read_folder


class Tokenizer:
    """The tokenizer of one model.

    Args:
        path: Model folder with a `tokenizer.json`, or a GGUF file.
        chat_template: Source of a template that replaces the model's own.

    Attributes:
        vocab_size: Largest token id of the tokenizer plus one; the logits may be wider.
        bos_token: Text of the beginning-of-sequence token, or None.
        eos_token: Text of the end-of-sequence token, or None.
        chat_template: The compiled template, or None if the model has none.

    Raises:
        ModelError: A file is missing or cannot be used; says which and why.
    """

    def __init__(self, path: Path | str, chat_template: str | None = None) -> None:
        found = _read(Path(path))
        self._source = found.source
        try:
            self.pieces = pieces_of(found.source)
        except ValueError as error:
            raise ModelError(f"{found.path}: {error}.") from None
        self.bos_token, self.eos_token = found.bos_token, found.eos_token
        self.vocab_size = max(found.source.get_vocab(True).values(), default=-1) + 1
        template = chat_template or found.template
        self.chat_template = (
            None if template is None else ChatTemplate(template, self.bos_token, self.eos_token)
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


def _read(path: Path) -> Vocabulary:
    if path.is_dir() or not is_gguf(path):
        return read_folder(path)
    from vllm_server.text.gguf_tokenizer import read_gguf

    return read_gguf(path)
