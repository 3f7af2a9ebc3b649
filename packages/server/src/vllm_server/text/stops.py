"""Finds stop strings in a text that arrives in pieces.

Text that could begin a stop string is held back, so nothing of one is ever shown. Work is linear
in the text. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Pattern:
    """One stop string, with the table that says how far a failed match falls back."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._fallback[length - 1]
            length += text[i] == text[length]
            self._fallback[i] = length

    def advance(self, char: str) -> bool:
        """Take one character; whether the stop string is complete."""
        text, matched = self.text, self.matched
        while matched and text[matched] != char:
            matched = self._fallback[matched - 1]
        self.matched = matched + (text[matched] == char)
        return self.matched == len(text)


class StopFinder:
    """Cuts a text at the first stop string that is completed.

    Args:
        stops: Non-empty strings.
        include: Keep the stop string at the end of the text.

    Attributes:
        found: The stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.found: str | None = None
        self._include = include
        # Longest first: of two that end together the longer one began earlier.
        self._patterns = [_Pattern(s) for s in sorted(set(stops), key=lambda s: (-len(s), s))]
        self._held = ""

    @property
    def is_active(self) -> bool:
        """Whether there is any stop string to look for."""
        return bool(self._patterns)

    def feed(self, text: str) -> str:
        """The text that is certain not to belong to a stop string; nothing after one was found."""
        if not self._patterns:
            return text
        if self.found is not None:
            return ""
        start = len(self._held)
        self._held += text
        for at in range(start, len(self._held)):
            ended = [p.text for p in self._patterns if p.advance(self._held[at])]
            if ended:
                return self._cut(ended[0], at + 1)
        keep = max(p.matched for p in self._patterns)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _cut(self, stop: str, end: int) -> str:
        self.found = stop
        shown = self._held[: end if self._include else end - len(stop)]
        self._held = ""
        return shown
