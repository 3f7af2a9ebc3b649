"""Conversations, and how their phrasings are split into training and held-out ones.

A phrasing is a template string. Its digest decides which split it belongs to, so the evaluation
asks in words that training never saw, whatever order the topics are generated in. The first
phrasing of a list is the plainest one and always trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

Split = Literal["train", "held_out"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's answer, and what an evaluation expects of it.

    Attributes:
        topic: Name of the topic, for the evaluation's table.
        messages: In the OpenAI form; the last one is the answer to learn.
        tools: Function descriptions for the system turn.
        thinking: False renders the prompt with `enable_thinking=False`.
        keywords: Words of which a right answer holds every one.
        exact: Whether a right answer, thinking removed, equals the last message.
        accepted: If there are any, the only right answers.
    """

    topic: str
    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    thinking: bool = True
    keywords: tuple[str, ...] = ()
    exact: bool = False
    accepted: tuple[str, ...] = ()


@dataclass(slots=True)
class Phrasings:
    """Chooses among phrasings of one split.

    Attributes:
        num_of_split: Choices from the split so far.
        num_of_other: Choices from the other split, because this one had none to offer.
    """

    rng: Random
    split: Split
    num_of_split: int = 0
    num_of_other: int = 0
    _cache: dict[int, list[str]] = field(default_factory=dict)

    def pick(self, templates: Sequence[str]) -> str:
        """One template of the split; any template where the split has none."""
        found = self._cache.get(id(templates))
        if found is None:
            is_test = self.split == "held_out"
            found = [t for t in templates if (t != templates[0] and is_held_out(t)) == is_test]
            self._cache[id(templates)] = found
        if found:
            self.num_of_split += 1
        else:
            self.num_of_other += 1
        return self.rng.choice(found or templates)


def is_held_out(template: str) -> bool:
    """Whether a phrasing belongs to the evaluation: about one in eight does."""
    return hashlib.sha256(template.encode()).digest()[0] % 8 == 0


def ask(question: str, answer: str, system: str = "") -> tuple[Message, ...]:
    """A question and its answer, below an optional system prompt."""
    first = ({"role": "system", "content": system},) if system else ()
    return (
        *first,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )


def casual(rng: Random, text: str) -> str:
    """A question as people type it: sometimes without capitals or punctuation."""
    roll = rng.random()
    if roll < 0.12:
        text = text[0].lower() + text[1:]
    elif roll < 0.2:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    return text
