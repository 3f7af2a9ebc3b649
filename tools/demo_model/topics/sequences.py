"""Counting, copying, reversing, sorting and other work on short sequences."""

from __future__ import annotations

from random import Random

from phrasing import Conversation, Phrasings, ask, casual

from topics.words import ANIMALS, COLORS, DAYS, FOODS, MONTHS, THINGS, a_city, a_name, invented_word

COUNT = ("Count from {a} to {b}.", "Please count from {a} to {b}.", "Count up from {a} to {b}.", "Write the numbers from {a} to {b}.", "List the numbers {a} to {b}.",
         "Can you count from {a} to {b}?", "Numbers from {a} to {b}, please.", "Start at {a} and count to {b}.", "Give me the numbers from {a} to {b}.")  # fmt: skip
COUNT_TO = ("Count to {b}.", "Please count to {b}.", "Can you count to {b}?", "Count up to {b}.")
COUNT_DOWN = (
    "Count down from {b} to {a}.",
    "Count backwards from {b} to {a}.",
    "Write the numbers from {b} down to {a}.",
    "Please count down from {b} to {a}.",
)
REPEAT = ("Repeat: {text}", "Repeat after me: {text}", "Say: {text}", "Copy this: {text}", "Please repeat this: {text}", "Write exactly: {text}", "Echo: {text}",
          "Repeat the following words: {text}", "Copy the words: {text}", "Say exactly this: {text}")  # fmt: skip
PHRASES = ("hello world", "Hello, world!", "Hello", "good morning", "one two three", "a b c", "yes", "The quick brown fox jumps over the lazy dog.", "vllm-lite is small.", "I like it.", "testing, testing")  # fmt: skip
REVERSE = (
    "Reverse the list: {text}",
    "Reverse: {text}",
    "Write in reverse order: {text}",
    "Turn this list around: {text}",
    "Say these words backwards: {text}",
)
FIRST = (
    "What is the first word of: {text}",
    "First word of: {text}",
    "Which word comes first: {text}",
    "Tell me the first word: {text}",
)
LAST = (
    "What is the last word of: {text}",
    "Last word of: {text}",
    "Which word comes last: {text}",
    "Tell me the last word: {text}",
)
HOW_MANY = (
    "How many words are in this list: {text}",
    "Count the words: {text}",
    "How many words: {text}",
    "How long is this list: {text}",
)
UPPER = (
    "Write in capital letters: {text}",
    "Make this uppercase: {text}",
    "Uppercase: {text}",
    "In capitals: {text}",
)
SPELL = (
    "Spell {text}.",
    "How do you spell {text}?",
    "Spell the word {text}.",
    "Please spell {text}.",
)
AFTER = (
    "Which {unit} comes after {x}?",
    "What {unit} follows {x}?",
    "What is the {unit} after {x}?",
    "{x} is followed by which {unit}?",
)
ALL = (
    "Name the {unit}s.",
    "List the {unit}s.",
    "What are the {unit}s?",
    "Tell me all {unit}s.",
    "Which {unit}s are there?",
)


def _words(rng: Random, low: int, high: int) -> list[str]:
    pool = rng.choice((THINGS, COLORS, FOODS, ANIMALS))
    if rng.random() < 0.4:
        return [invented_word(rng) for _ in range(rng.randint(low, high))]
    return rng.sample(pool, rng.randint(low, high))


def _count(rng: Random, phrasings: Phrasings) -> tuple[str, str]:
    if rng.random() < 0.15:
        b = rng.randint(3, 20)
        return phrasings.pick(COUNT_TO).format(b=b), ", ".join(str(n) for n in range(1, b + 1))
    a = rng.randint(0, 20) if rng.random() < 0.8 else rng.randint(0, 90)
    b = a + rng.randint(2, 9)
    numbers = [str(n) for n in range(a, b + 1)]
    if rng.random() < 0.3:
        return phrasings.pick(COUNT_DOWN).format(a=a, b=b), ", ".join(reversed(numbers))
    return phrasings.pick(COUNT).format(a=a, b=b), ", ".join(numbers)


def _copy(rng: Random, phrasings: Phrasings) -> tuple[str, str]:
    roll = rng.random()
    if roll < 0.1:
        text = rng.choice(PHRASES)
    elif roll < 0.5:
        text = " ".join(_words(rng, 2, 7))
    elif roll < 0.75:
        text = f"{a_name(rng)} lives in {a_city(rng)} and likes {rng.choice(FOODS)}."
    else:
        text = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 8)))
    return phrasings.pick(REPEAT).format(text=text), text


def _on_list(rng: Random, phrasings: Phrasings) -> tuple[str, str]:
    words = _words(rng, 2, 5)
    text = ", ".join(words)
    kind = rng.randrange(4)
    if kind == 0:
        return phrasings.pick(REVERSE).format(text=text), ", ".join(reversed(words))
    if kind == 1:
        return phrasings.pick(FIRST).format(text=text), words[0]
    if kind == 2:
        return phrasings.pick(LAST).format(text=text), words[-1]
    return phrasings.pick(HOW_MANY).format(text=text), str(len(words))


def _letters(rng: Random, phrasings: Phrasings) -> tuple[str, str]:
    word = rng.choice(rng.choice((THINGS, COLORS, FOODS, ANIMALS)))
    if rng.random() < 0.5:
        return phrasings.pick(SPELL).format(text=word), "-".join(word.upper())
    return phrasings.pick(UPPER).format(text=word), word.upper()


def _calendar(rng: Random, phrasings: Phrasings) -> tuple[str, str]:
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS)))
    if rng.random() < 0.3:
        return phrasings.pick(ALL).format(unit=unit), ", ".join(names)
    index = rng.randrange(len(names))
    return phrasings.pick(AFTER).format(unit=unit, x=names[index]), names[(index + 1) % len(names)]


KINDS = (_count, _count, _copy, _copy, _on_list, _letters, _calendar)


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """One small task on a sequence."""
    question, answer = rng.choice(KINDS)(rng, phrasings)
    if ":" not in question:
        question = casual(rng, question)
    system = rng.choice(("", "", "", "You are a helpful assistant."))
    return Conversation("sequences", ask(question, answer, system), exact=True)
