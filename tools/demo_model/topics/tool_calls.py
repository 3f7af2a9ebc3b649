"""Tool calls in the Hermes form, and answers built from what a tool returned."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from phrasing import Conversation, Message, Phrasings

from topics.words import THINGS, WEATHER, a_city, a_name, invented_word

Arguments = dict[str, Any]


class Tool(NamedTuple):
    """A function, how people ask for it, and how its result is told.

    Attributes:
        name: Name of the function.
        description: For the system turn.
        parameters: Type of each parameter; all are required.
        asks: Questions with the parameters as fields.
        arguments: Draws values for the parameters.
        outcome: Draws a tool response and the sentence that tells it.
    """

    name: str
    description: str
    parameters: dict[str, str]
    asks: tuple[str, ...]
    arguments: Callable[[Random], Arguments]
    outcome: Callable[[Random, Arguments], tuple[Arguments, str]]


def _weather(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    kind, degrees = rng.choice(WEATHER), rng.randint(-9, 38)
    told = f"It is {kind} in {a['city']} with {degrees} degrees."
    return {"condition": kind, "temperature": degrees}, told


def _time(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return {"time": clock}, f"It is {clock} in {a['city']}."


def _calculate(rng: Random, a: Arguments) -> tuple[Arguments, str]:
    left, sign, right = a["expression"].split()
    x, y = int(left), int(right)
    result = {"+": x + y, "-": x - y, "*": x * y}[sign]
    return {"result": result}, f"The result is {result}."


def _expression(rng: Random) -> Arguments:
    return {"expression": f"{rng.randint(1, 999)} {rng.choice('+-*')} {rng.randint(1, 999)}"}


def _topic(rng: Random) -> str:
    return rng.choice((rng.choice(THINGS), a_city(rng), invented_word(rng)))


TOOLS = (
    Tool("get_weather", "Get the weather of a city.", {"city": "string"},
         ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}?", "Is it raining in {city}?", "Tell me the weather in {city}.",
          "Do I need an umbrella in {city}?", "How warm is it in {city}?", "What's the weather like in {city} today?", "Please check the weather in {city}.",
          "Get the weather for {city}.", "I travel to {city}. How is the weather?", "Is it sunny in {city}?", "what is the weather like in {city}", "Weather for {city}, please."),
         lambda rng: {"city": a_city(rng)}, _weather),
    Tool("get_time", "Get the current time in a city.", {"city": "string"},
         ("What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?", "Current time in {city}?", "What is the time in {city} now?",
          "Please get the time in {city}.", "Do you know the time in {city}?", "Which time do they have in {city}?"),
         lambda rng: {"city": a_city(rng)}, _time),
    Tool("calculate", "Evaluate an expression.", {"expression": "string"},
         ("Calculate {expression}.", "What is {expression}?", "Compute {expression}.", "How much is {expression}?", "Use the calculator for {expression}.",
          "Please evaluate {expression}.", "I need {expression}.", "{expression}?", "Work out {expression} for me."),
         _expression, _calculate),
    Tool("search", "Search the web.", {"query": "string"},
         ("Search for {query}.", "Look up {query}.", "Find something about {query}.", "Can you search {query}?", "Search the web for {query}.",
          "Google {query}.", "Find {query} on the web.", "Please look for {query}."),
         lambda rng: {"query": _topic(rng)},
         lambda rng, a: ({"hits": (n := rng.randint(2, 90))}, f"I found {n} pages about {a['query']}.")),
    Tool("send_email", "Send an email.", {"to": "string", "subject": "string"},
         ("Send an email to {to} about {subject}.", "Write {to} an email with the subject {subject}.", "Email {to} about {subject}.", "Please mail {to} about {subject}.",
          "Send {to} a mail. The subject is {subject}.", "Can you email {to}? Subject: {subject}."),
         lambda rng: {"to": a_name(rng), "subject": _topic(rng)},
         lambda rng, a: ({"sent": True}, f"I sent the email to {a['to']}.")),
    Tool("set_timer", "Set a timer.", {"minutes": "integer"},
         ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.", "Timer, {minutes} minutes.", "Start a timer of {minutes} minutes.",
          "Remind me in {minutes} minutes.", "Please set a {minutes} minute timer.", "I need a timer for {minutes} minutes."),
         lambda rng: {"minutes": rng.randint(1, 90)},
         lambda rng, a: ({"ok": True}, f"The timer is set for {a['minutes']} minutes.")),
    Tool("get_price", "Get the price of a product.", {"product": "string"},
         ("How much does the {product} cost?", "What is the price of a {product}?", "Price of the {product}?", "Tell me the price of the {product}.",
          "How expensive is a {product}?", "What do I pay for a {product}?"),
         lambda rng: {"product": rng.choice(THINGS) if rng.random() < 0.7 else invented_word(rng)},
         lambda rng, a: ({"price": (n := rng.randint(1, 300))}, f"The {a['product']} costs {n} dollars.")),
)  # fmt: skip
NO_TOOL = (
    ("Hello!", "Hello! How can I help you?"), ("Hi there!", "Hi! What can I do for you?"),
    ("Thank you!", "You are welcome!"), ("Thanks!", "You are welcome!"),
    ("Who are you?", "I am vllm-lite-demo, a small demonstration model. Serve a real model with `--model`."),
    ("How are you?", "I am fine, thank you! How can I help you?"),
)  # fmt: skip


def describe(tool: Tool, rng: Random) -> Message:
    """The function in the OpenAI form, sometimes with descriptions of its parameters."""
    wordy = rng.random() < 0.15
    properties = {
        name: {"type": kind, "description": f"The {name}"} if wordy else {"type": kind}
        for name, kind in tool.parameters.items()
    }
    parameters = {"type": "object", "properties": properties, "required": list(tool.parameters)}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def generate(rng: Random, phrasings: Phrasings) -> Conversation:
    """A question that needs a tool, the turn after the tool answered, or small talk beside tools."""
    offered = rng.sample(TOOLS, rng.choice((1, 1, 2, 2, 3)))
    tools = tuple(describe(tool, rng) for tool in offered)
    system = rng.choice(("", "", "You are a helpful assistant."))
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    if rng.random() < 0.12:
        question, answer = rng.choice(NO_TOOL)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Conversation("tools", (*head, *turns), tools, exact=True)
    tool = rng.choice(offered)
    arguments = tool.arguments(rng)
    question = phrasings.pick(tool.asks).format(**arguments)
    call = {"function": {"name": tool.name, "arguments": json.dumps(arguments)}}
    turns = [
        *head,
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if rng.random() < 0.3:
        response, told = tool.outcome(rng, arguments)
        turns.append({"role": "tool", "content": json.dumps(response)})
        turns.append({"role": "assistant", "content": told})
    return Conversation("tools", tuple(turns), tools, exact=True)
