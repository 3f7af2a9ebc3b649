"""The training text: conversations of every topic, rendered by the model's own chat template.

Nothing is downloaded; the generator writes all text from a seed. `python corpus.py` prints samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment
from phrasing import Conversation, Message, Phrasings
from topics import (
    arithmetic,
    memory,
    product,
    sequences,
    smalltalk,
    stories,
    structured,
    tool_calls,
)

END = "<|endoftext|>"
TEMPLATE = Path(__file__).parent / "chat_template.jinja"
MODULES = (product, smalltalk, arithmetic, structured, tool_calls, sequences, stories)
# Shares of the topics. Facts are learned by heart first; skills need more examples than text; in
# the end everything is repeated at a low rate.
MIXES = {
    "facts": (30, 11, 17, 13, 15, 12, 6),
    "skills": (12, 5, 30, 8, 15, 27, 3),
    "polish": (18, 12, 25, 8, 14, 20, 3),
}


@cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE.read_text())


def render(messages: tuple[Message, ...], **variables: Any) -> str:
    """The prompt that serving builds from the same messages."""
    return _template().render(messages=list(messages), **variables)


def prompt_and_answer(conversation: Conversation) -> tuple[str, str]:
    """What the model is given, and what it has to write, the end of its turn included."""
    tools = list(conversation.tools) or None
    prompt = render(
        conversation.messages[:-1],
        tools=tools,
        add_generation_prompt=True,
        **({} if conversation.thinking else {"enable_thinking": False}),
    )
    last = conversation.messages[-1]
    answer = render((last,), add_generation_prompt=False)
    return prompt, answer.removeprefix("<|im_start|>assistant\n").removesuffix("\n")


def conversation(rng: Random, phrasings: Phrasings, mix: str) -> Conversation:
    """Mostly one topic; sometimes earlier turns come first, or a question about them."""
    roll = rng.random()
    if roll < 0.05:
        between = tuple(
            message for _ in range(rng.choice((0, 0, 1))) for message in _history(rng, phrasings)
        )
        return memory.recall(rng, phrasings, between)
    last = rng.choices(MODULES, MIXES[mix])[0].generate(rng, phrasings)
    if roll > 0.18 or last.messages[0]["role"] == "system":
        return last
    history = tuple(m for _ in range(rng.choice((1, 1, 2))) for m in _history(rng, phrasings))
    return Conversation(
        last.topic, (*history, *last.messages), last.tools, last.thinking, last.keywords, last.exact
    )


def _history(rng: Random, phrasings: Phrasings) -> tuple[Message, ...]:
    """An earlier exchange without a system turn or tools."""
    modules = (product, smalltalk, arithmetic, sequences, structured)
    earlier = rng.choice(modules).generate(rng, phrasings)
    return tuple(m for m in earlier.messages if m["role"] != "system")


def documents(seed: int, mix: str = "facts") -> Iterator[tuple[str, str]]:
    """Endless pairs of given text and text to learn; plain text has nothing given."""
    rng = Random(f"{seed}-{mix}")
    phrasings = Phrasings(rng, "train")
    while True:
        if rng.random() < 0.05:
            yield "", stories.plain_text(rng) + END
        else:
            yield prompt_and_answer(conversation(rng, phrasings, mix))


class Exam(NamedTuple):
    """A conversation to evaluate, and whether training never saw its phrasings."""

    conversation: Conversation
    is_new: bool


def held_out(seed: int, count: int) -> list[Exam]:
    """The same number of conversations for every topic, in new phrasings where there are any."""
    rng = Random(f"{seed}-held_out")
    generators = [module.generate for module in MODULES]
    exams = []
    for generate in (*generators, lambda rng, phrasings: memory.recall(rng, phrasings, ())):
        for _ in range(count):
            phrasings = Phrasings(rng, "held_out")
            conversation = generate(rng, phrasings)
            is_new = phrasings.num_of_split > 0 and phrasings.num_of_other == 0
            exams.append(Exam(conversation, is_new))
    return exams


if __name__ == "__main__":
    for _, (given, learned) in zip(range(12), documents(seed=0), strict=False):
        print(given + "⟦" + learned + "⟧\n" + "-" * 80)
