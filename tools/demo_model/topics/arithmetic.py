"""Small sums, differences and products, worked out in a think block."""

from __future__ import annotations

from random import Random

from phrasing import Conversation, Phrasings, ask, casual

from topics.words import THINGS, a_name

PLAIN = (
    "{a}{sign}{b}", "What is {a} {sign} {b}?", "{a} {sign} {b}", "{a} {sign} {b} = ?", "Calculate {a} {sign} {b}.", "How much is {a} {sign} {b}?",
    "Compute {a} {sign} {b}.", "What's {a} {sign} {b}?", "Please calculate {a} {sign} {b}.", "Can you work out {a} {sign} {b}?", "Solve {a} {sign} {b}.",
    "Tell me what {a} {sign} {b} is.", "What does {a} {sign} {b} equal?", "What is {a} {word} {b}?", "How much is {a} {word} {b}?", "{a} {word} {b}?",
    "Calculate {a} {word} {b}.", "I need the result of {a} {sign} {b}.", "Do you know {a} {sign} {b}?", "What is the result of {a} {sign} {b}?",
    "Give me {a} {sign} {b}.", "What do you get for {a} {sign} {b}?",
)  # fmt: skip
STORIES = {
    "+": (
        "{name} has {a} {thing}s and gets {b} more. How many {thing}s does {name} have?",
        "There are {a} {thing}s in a box and {b} on the table. How many {thing}s are there?",
        "{name} buys {a} {thing}s and then {b} more. How many is that?",
        "I have {a} {thing}s. You give me {b}. How many do I have now?",
    ),
    "-": (
        "{name} has {a} {thing}s and loses {b}. How many {thing}s are left?",
        "There are {a} {thing}s in a box. {name} takes {b}. How many remain?",
        "I have {a} {thing}s and give away {b}. How many do I keep?",
    ),
    "*": (
        "There are {a} boxes with {b} {thing}s each. How many {thing}s are there?",
        "{name} buys {b} {thing}s on each of {a} days. How many is that?",
    ),
}
WORDS = {"+": "plus", "-": "minus", "*": "times"}


def operands(rng: Random) -> tuple[int, str, int]:
    """Two numbers and a sign; differences are never negative."""
    sign = rng.choices("+-*", (5, 3, 2))[0]
    high = 20 if rng.random() < 0.6 else 99
    if sign == "*":
        return rng.randint(0, 10), sign, rng.randint(0, 10)
    a, b = rng.randint(0, high), rng.randint(0, high)
    return (max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)


def work_out(a: int, sign: str, b: int) -> str:
    """The steps on the way to the result, tens and ones apart where both numbers have them."""
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    if sign == "+" and a > 9 and b > 9:
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        return (
            f"{a // 10 * 10} + {b // 10 * 10} = {tens}. {a % 10} + {b % 10} = {ones}. "
            f"{tens} + {ones} = {result}."
        )
    if sign == "-" and b > 9:
        rest = a - b // 10 * 10
        return f"{a} - {b // 10 * 10} = {rest}. {rest} - {b % 10} = {result}."
    return f"{a} {sign} {b} = {result}."


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """One sum, with thinking in three of four cases."""
    a, sign, b = operands(rng)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    answer = f"{a} {sign} {b} = {result}."
    if rng.random() < 0.2:
        thing = rng.choice(THINGS)
        question = phrasings.pick(STORIES[sign]).format(a=a, b=b, thing=thing, name=a_name(rng))
        answer = f"The answer is {result}."
    else:
        shown = rng.choice(("x", "*", "*")) if sign == "*" else sign
        question = phrasings.pick(PLAIN).format(a=a, b=b, sign=shown, word=WORDS[sign])
        question = casual(rng, question) if question[0].isalpha() else question
    thinking = rng.random() < 0.75
    if thinking:
        answer = f"<think>\n{work_out(a, sign, b)}\n</think>\n\n{answer}"
    system = rng.choice(
        ("", "", "", "", "You are a helpful assistant.", "You are good at arithmetic.")
    )
    return Conversation("arithmetic", ask(question, answer, system), thinking=thinking, exact=True)
