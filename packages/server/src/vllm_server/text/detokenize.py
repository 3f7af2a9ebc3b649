"""Token ids to text, one token at a time, never splitting a character.

The pieces of the tokens are bytes; bytes of an incomplete character wait for the rest. Work is
linear in the text. Knows nothing of stop strings or requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from vllm_server.text.pieces import Pieces

_DECODER = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one completion.

    For every way of cutting a list of ids into calls, the joined answers of `feed` and the last
    `flush` are the same text.

    Args:
        pieces: Bytes of the tokens.
        prompt_ids: What came before; only whether it has any text matters.
        skip_special_tokens: Leave out special tokens.
        keep_ids: Special tokens that are shown all the same.
    """

    def __init__(
        self,
        pieces: Pieces,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        keep_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = pieces
        self._skipped = pieces.special_ids - keep_ids if skip_special_tokens else frozenset[int]()
        self._decoder = _DECODER("replace")
        self._spaces_to_strip = pieces.strips_first
        if pieces.strips_first and any(i not in self._skipped for i in prompt_ids):
            self._spaces_to_strip = 0

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete."""
        pieces, skipped = self._pieces, self._skipped
        text = self._decoder.decode(b"".join([pieces[i] for i in token_ids if i not in skipped]))
        return self._stripped(text) if self._spaces_to_strip and text else text

    def flush(self) -> str:
        """What is left when no more tokens come: replacement characters for incomplete ones."""
        return self._stripped(self._decoder.decode(b"", True))

    def _stripped(self, text: str) -> str:
        while self._spaces_to_strip and text:
            if text[0] != " ":
                self._spaces_to_strip = 0
                break
            text = text[1:]
            self._spaces_to_strip -= 1
        return text


def decode(pieces: Pieces, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
    """The text of a whole list of ids."""
    stream = Detokenizer(pieces, (), skip_special_tokens)
    return stream.feed(token_ids) + stream.flush()
