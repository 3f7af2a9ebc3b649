"""Answers in JSON, with the values copied from the question."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from phrasing import Conversation, Phrasings, ask

from topics.words import COLORS, COUNTRIES, FOODS, JOBS, THINGS, a_city, a_name, a_thing

Values = dict[str, Any]
TYPES = {str: "string", int: "integer", bool: "boolean", list: "array"}


def person(rng: Random) -> tuple[str, Values]:
    """A person with two or three properties."""
    name, age, city, job = a_name(rng), rng.randint(1, 99), a_city(rng), rng.choice(JOBS)
    return rng.choice(
        (
            (f"{name} is {age} years old.", {"name": name, "age": age}),
            (f"My name is {name} and I am {age}.", {"name": name, "age": age}),
            (f"{name}, {age}, lives in {city}.", {"name": name, "age": age, "city": city}),
            (f"{name} is a {job} from {city}.", {"name": name, "job": job, "city": city}),
            (f"{age} years old, {name} works as a {job}.", {"name": name, "age": age, "job": job}),
        )
    )


def product(rng: Random) -> tuple[str, Values]:
    """Something for sale."""
    thing, color = a_thing(rng), rng.choice(COLORS)
    price, quantity = rng.randint(1, 200), rng.randint(1, 50)
    return rng.choice(
        (
            (f"A {color} {thing} costs {price} dollars.", {"product": thing, "color": color, "price": price}),
            (f"We sell {quantity} {thing}s for {price} dollars.", {"product": thing, "quantity": quantity, "price": price}),
            (f"I want to buy {quantity} {thing}s.", {"product": thing, "quantity": quantity}),
            (f"The {thing} is {color}.", {"product": thing, "color": color}),
        )
    )  # fmt: skip


def place(rng: Random) -> tuple[str, Values]:
    """A city in a country."""
    city, country = rng.choice(list(COUNTRIES.items()))
    people = rng.randint(1, 40) * 100000
    return rng.choice(
        (
            (f"{city} is in {country}.", {"city": city, "country": country}),
            (f"{city} in {country} has {people} people.", {"city": city, "country": country, "population": people}),
        )
    )  # fmt: skip


def flag(rng: Random) -> tuple[str, Values]:
    """Something that is so or not."""
    name, on = a_name(rng), rng.random() < 0.5
    return rng.choice(
        (
            (f"{name} is {'' if on else 'not '}married.", {"name": name, "married": on}),
            (f"{name} {'likes' if on else 'does not like'} {(food := rng.choice(FOODS))}.", {"name": name, "food": food, "likes": on}),
            (f"The lamp is {'on' if on else 'off'}.", {"device": "lamp", "on": on}),
        )
    )  # fmt: skip


def listing(rng: Random) -> tuple[str, Values]:
    """Several things at once."""
    words = rng.sample(rng.choice((THINGS, COLORS, FOODS)), rng.randint(2, 4))
    text = ", ".join(words[:-1]) + " and " + words[-1]
    key = rng.choice(("items", "words", "list"))
    return f"I need {text}.", {key: words}


FAMILIES = (person, person, product, product, place, flag, listing)
ASK_SCHEMA = (
    "{text} Answer with JSON that matches this schema: {schema}",
    "{text}\nReturn JSON for this schema: {schema}",
    "Use this JSON schema: {schema}\nText: {text}",
    "Extract the data as JSON. Schema: {schema} Text: {text}",
    "Schema: {schema}\n{text}",
    "Fill this schema: {schema}\nText: {text}",
    "Write a JSON object for the schema {schema} from this text: {text}",
    "{text} Give me that as JSON: {schema}",
    "Answer only with JSON. Schema: {schema}\nText: {text}",
    "Convert to JSON with the schema {schema}: {text}",
)
ASK_KEYS = (
    "{text} Answer with a JSON object with the keys {keys}.",
    "Extract {keys} as JSON: {text}",
    "{text} Give me JSON with {keys}.",
    "Return a JSON object with {keys} for: {text}",
    "Make JSON with the keys {keys}. {text}",
    "As JSON with {keys}, please: {text}",
    "{text} Put {keys} into JSON.",
    "Write JSON with the fields {keys}. Text: {text}",
)


def schema_of(values: Values) -> dict[str, Any]:
    """A JSON schema that the values match."""
    properties: dict[str, Any] = {key: {"type": TYPES[type(v)]} for key, v in values.items()}
    for key, value in values.items():
        if isinstance(value, list):
            properties[key]["items"] = {"type": "string"}
    return {"type": "object", "properties": properties, "required": list(values)}


def key_list(values: Values) -> str:
    """The keys in a sentence."""
    keys = list(values)
    return ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """A text and the JSON object it amounts to."""
    text, values = rng.choice(FAMILIES)(rng)
    answer = json.dumps(values, ensure_ascii=False)
    system = ""
    if rng.random() < 0.7:
        schema = json.dumps(schema_of(values))
        if rng.random() < 0.15:
            system, question = f"Answer with JSON that matches this schema: {schema}", text
        else:
            question = phrasings.pick(ASK_SCHEMA).format(text=text, schema=schema)
    else:
        question = phrasings.pick(ASK_KEYS).format(text=text, keys=key_list(values))
    return Conversation("json", ask(question, answer, system), exact=True)
