"""What structured output needs of a grammar: which tokens may come next, and a way to move on."""

from __future__ import annotations

from typing import Protocol


class Grammar(Protocol):
    """State of one completion under a grammar; owned by the engine, never by a backend."""

    def mask(self) -> bytes:
        """Allowed next tokens, one bit per token id, least significant bit first.

        Returns:
            `ceil(vocab_size / 8)` bytes; ids past the end are forbidden.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advance over a confirmed token.

        Raises:
            ValueError: The token is not allowed here.
        """
        ...
