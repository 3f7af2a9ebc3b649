"""Longer conversations: several topics in a row, and things said before."""

from __future__ import annotations

from random import Random

from phrasing import Conversation, Message, Phrasings

from topics.words import ANIMALS, COLORS, FOODS, a_city, a_name

FACTS = {
    "name": (("My name is {x}.", "I am {x}.", "Call me {x}.", "Hi, I'm {x}.", "Hello, my name is {x}."), ("What is my name?", "Do you remember my name?", "Who am I?", "How am I called?"),
             "Nice to meet you, {x}!", "Your name is {x}."),
    "city": (("I live in {x}.", "My home is {x}.", "I come from {x}."), ("Where do I live?", "Which city do I live in?", "Do you remember my city?"),
             "{x} is a nice place!", "You live in {x}."),
    "color": (("My favorite color is {x}.", "I like {x} most.", "The color I love is {x}."), ("What is my favorite color?", "Which color do I like?"),
              "A good choice!", "Your favorite color is {x}."),
    "food": (("My favorite food is {x}.", "I love {x}.", "I like to eat {x}."), ("What is my favorite food?", "What do I like to eat?"),
             "That sounds tasty!", "You like {x}."),
    "animal": (("I have a {x}.", "My pet is a {x}.", "I own a {x}."), ("What pet do I have?", "Which animal do I have?"),
               "How nice!", "You have a {x}."),
}  # fmt: skip


def _value(rng: Random, kind: str) -> str:
    if kind == "name":
        return a_name(rng)
    if kind == "city":
        return a_city(rng)
    return rng.choice({"color": COLORS, "food": FOODS, "animal": ANIMALS}[kind])


def recall(rng: Random, phrasings: Phrasings, between: tuple[Message, ...]) -> Conversation:
    """Something the user says, other turns, and a question that needs it."""
    kind = rng.choice(tuple(FACTS))
    says, asks, reply, answer = FACTS[kind]
    x = _value(rng, kind)
    messages = (
        {"role": "user", "content": phrasings.pick(says).format(x=x)},
        {"role": "assistant", "content": reply.format(x=x)},
        *between,
        {"role": "user", "content": phrasings.pick(asks)},
        {"role": "assistant", "content": answer.format(x=x)},
    )
    return Conversation("memory", messages, exact=True)
