"""Short stories, as answers and as plain text for raw completion."""

from __future__ import annotations

from random import Random

from phrasing import Conversation, Phrasings, ask, casual

from topics.words import ANIMALS, COLORS, COUNTRIES, FOODS, PLACES, THINGS, TRAITS, a_name

ASK = (
    "Tell me a story about a {who}.", "Write a short story about a {who}.", "A story about a {who}, please.", "Can you tell a story about a {who}?",
    "Make up a story about a {who}.", "Tell a short story with a {who}.", "I want to hear a story about a {who}.", "Please write a story about a {who}.",
    "Story about a {who}!", "Give me a little story about a {who}.", "Do you know a story about a {who}?", "Invent a story about a {who}.",
)  # fmt: skip
ASK_ANY = (
    "Tell me a story.",
    "Write a short story.",
    "A story, please.",
    "Can you tell me a story?",
    "Tell me something nice.",
    "Make up a story.",
)
OPENINGS = (
    "Once upon a time there was a {trait} {who} named {name}. {name} lived in a {place}.",
    "Once upon a time a {trait} {who} lived in a {place}. Its name was {name}.",
    "In a {place} far away lived a {trait} {who} called {name}.",
    "There was once a {trait} {who} in a small {place}. Everybody called it {name}.",
)
MIDDLES = (
    "One day {name} found a {color} {thing} near the {place}. {name} did not know whose it was.",
    "One morning {name} lost a {color} {thing} and looked for it everywhere.",
    "One day {name} was very hungry and wanted some {food}.",
    "One evening {name} met a {trait2} {who2} who was looking for a friend.",
    "One day it began to rain, and the {who2} next door had no roof.",
    "One night {name} heard a strange sound behind the {place}.",
)
TURNS = (
    "So {name} asked the {trait2} {who2} for help.",
    "{name} thought for a while and had a {trait2} idea.",
    'The {who2} smiled and said: "Let us do it together."',
    "At first {name} was afraid, but then a {who2} came along.",
    "{name} walked all day and met a {trait2} {who2}.",
)
ENDINGS = (
    "Together they shared some {food}, and from that day on they were friends.",
    "In the end everything was fine, and {name} went home happy.",
    "They laughed, ate {food} and became the best of friends.",
    "That night {name} slept well and dreamed of the {color} {thing}.",
    "And if you walk through the {place} today, you can still see them play.",
)
PLAIN = (
    "The capital of {country} is {capital}.",
    "Hello, how are you? I am fine, thank you. The weather is {weather} today, and I will go to the {place} with {name}.",
    "Hello, my name is {name}. I live in a {place} and I like {food}.",
    "{name} went to the {place} to buy a {color} {thing}. It was {trait}, but {name} liked it.",
    "The {color} {thing} is on the table. {name} put it there in the morning.",
    "Hello world! This text was written by vllm-lite-demo, a small demonstration model.",
    "vllm-lite is a small, readable LLM inference engine in Python. It has continuous batching, a paged KV cache and a prefix cache.",
    "The quick brown {who} jumps over the lazy {who2}.",
    "Today is a good day. {name} and the {who} walk through the {place} and talk about {food}.",
)  # fmt: skip


def story(rng: Random, who: str) -> str:
    """Four to five sentences around one animal."""
    fields = {
        "who": who,
        "who2": rng.choice([a for a in ANIMALS if a != who]),
        "trait": rng.choice(TRAITS),
        "trait2": rng.choice(TRAITS),
        "name": a_name(rng),
        "place": rng.choice(PLACES),
        "color": rng.choice(COLORS),
        "thing": rng.choice(THINGS),
        "food": rng.choice(FOODS),
    }
    parts = (OPENINGS, MIDDLES, TURNS, ENDINGS)
    return " ".join(rng.choice(part).format(**fields) for part in parts)


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """A wish for a story, and the story."""
    who = rng.choice(ANIMALS)
    templates, keywords = (ASK, (who,)) if rng.random() < 0.85 else (ASK_ANY, (". ",))
    question = casual(rng, phrasings.pick(templates).format(who=who))
    return Conversation("stories", ask(question, story(rng, who)), keywords=keywords)


def plain_text(rng: Random) -> str:
    """Text without roles, for completions of a bare prompt."""
    if rng.random() < 0.5:
        return story(rng, rng.choice(ANIMALS))
    capital, country = rng.choice(list(COUNTRIES.items()))
    return rng.choice(PLAIN).format(
        capital=capital, country=country, name=a_name(rng), place=rng.choice(PLACES), food=rng.choice(FOODS), color=rng.choice(COLORS), thing=rng.choice(THINGS),
        trait=rng.choice(TRAITS), who=rng.choice(ANIMALS), who2=rng.choice(ANIMALS), weather=rng.choice(("sunny", "rainy", "cold", "warm")),
    )  # fmt: skip
