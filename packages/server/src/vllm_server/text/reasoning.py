"""Splits an answer into what the model thought and what it says.

One incremental reader of `<think>...</think>`; however a text is cut into pieces, the joined
parts are the same. Blank space around the markers belongs to neither part.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN = "<think>"
CLOSE = "</think>"


class Parts(NamedTuple):
    """News of an answer.

    Attributes:
        reasoning: What the model thought.
        content: What it says.
    """

    reasoning: str = ""
    content: str = ""


State = Literal["start", "reasoning", "gap", "content"]


class ReasoningReader:
    """Reads one answer.

    Args:
        opened: The prompt already ends with the opening marker.
    """

    def __init__(self, opened: bool = False) -> None:
        self._state: State = "reasoning" if opened else "start"
        self._held = ""
        self._has_reasoning = False

    @property
    def is_reasoning(self) -> bool:
        """Whether the model is thinking, as far as the text was read."""
        return self._state == "reasoning"

    @property
    def is_done(self) -> bool:
        """Whether all further text is content."""
        return self._state == "content"

    def feed(self, text: str) -> Parts:
        """Split the next piece of text."""
        if self._state == "content":
            return Parts(content=text)
        self._held += text
        reasoning = content = ""
        if self._state == "start":
            content = self._read_start()
        if self._state == "reasoning":
            reasoning = self._read_reasoning()
        if self._state == "gap":
            content = self._read_gap()
        return Parts(reasoning, content)

    def flush(self) -> Parts:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return Parts(reasoning=held.rstrip())
        return Parts() if self._state == "gap" else Parts(content=held)

    def _read_start(self) -> str:
        """Blank space, then perhaps the opening marker; anything else is content."""
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._held = begun[len(OPEN) :]
            self._state = "reasoning"
            return ""
        if OPEN.startswith(begun):
            return ""
        return self._to_content(self._held)

    def _read_reasoning(self) -> str:
        if not self._has_reasoning:
            self._held = self._held.lstrip()
        at = self._held.find(CLOSE)
        if at >= 0:
            shown, self._held = self._held[:at].rstrip(), self._held[at + len(CLOSE) :]
            self._state = "gap"
            return shown
        keep = _possible_marker(self._held)
        shown = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(shown) :]
        self._has_reasoning = self._has_reasoning or bool(shown)
        return shown

    def _read_gap(self) -> str:
        text = self._held.lstrip()
        return self._to_content(text) if text else ""

    def _to_content(self, text: str) -> str:
        self._state, self._held = "content", ""
        return text


def _possible_marker(text: str) -> int:
    """How many characters at the end could begin the closing marker."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return length
    return 0


def is_opened(prompt: str) -> bool:
    """Whether a prompt ends with the opening marker, so that the answer starts inside it."""
    return prompt.rstrip().endswith(OPEN)


def writes_reasoning(template: str) -> bool:
    """Whether a chat template belongs to a model that thinks between the markers."""
    return CLOSE in template
