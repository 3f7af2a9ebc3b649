"""What a runner is asked to do and how it answers. Standard library only, since the environments of
other engines run it too.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

_WARM_PROMPT, _WARM_OUTPUT = 16, 2


class Task(NamedTuple):
    """One measurement: prompts of the same length, then so many tokens for each of them.

    Attributes:
        case: Its name.
        batch: Prompts at once.
        prompt: Tokens of each.
        output: Tokens after the first one that are timed; 0 measures the prompts alone.
    """

    case: str
    batch: int
    prompt: int
    output: int


class Plan(NamedTuple):
    """Everything one process does.

    Attributes:
        model: Folder or file.
        threads: Of the processor.
        vocab_size: Prompts are random ids below it.
        max_model_len: Longest sequence of any task, with room.
        kv_bytes: Memory for keys and values, enough for every task.
        started: Wall clock of the moment before the process was started.
        tasks: In this order.
    """

    model: str
    threads: int
    vocab_size: int
    max_model_len: int
    kv_bytes: int
    started: float
    tasks: tuple[Task, ...]

    @property
    def max_batch(self) -> int:
        """Most prompts at once."""
        return max(task.batch for task in self.tasks)


class Times(NamedTuple):
    """Seconds until every prompt had its first token, and those of `tokens` more tokens."""

    prompts: float
    decode: float = 0.0
    tokens: int = 0


Prompts = list[list[int]]


class Runner(Protocol):
    """An engine with a model in it."""

    def run(self, prompts: Prompts, output: int) -> Times:
        """Greedy, with no stop, from an empty cache."""
        ...


def plan_from(text: str) -> Plan:
    """The plan as `json.dumps` wrote it."""
    fields = json.loads(text)
    return Plan(*fields[:-1], tuple(Task(*task) for task in fields[-1]))


def prompts_of(task: Task, vocab_size: int, seed: str = "") -> Prompts:
    """The same ids in every engine; no two prompts begin alike."""
    source = random.Random(f"{task.case}{seed}")
    ids = range(min(vocab_size, 151_000) - 1)
    return [source.choices(ids, k=task.prompt) for _ in range(task.batch)]


def serve(engine: str, start: Callable[[Plan], tuple[str, Runner]]) -> None:
    """Start the engine, run the plan given as the first argument, print one line per task."""
    plan = plan_from(sys.argv[1])
    version, runner = start(plan)
    ready = time.time() - plan.started
    first = None
    for task in plan.tasks:
        warm = task._replace(prompt=min(_WARM_PROMPT, task.prompt))
        runner.run(prompts_of(warm, plan.vocab_size, "warm"), 0)
        first = first or time.time() - plan.started
        runner.run(prompts_of(warm, plan.vocab_size, "warm up"), min(_WARM_OUTPUT, task.output))
        times = runner.run(prompts_of(task, plan.vocab_size), task.output)
        line = {"engine": engine, "version": version, **rates(task, times)}
        print(json.dumps({**line, "ready_s": ready, "first_token_s": first}), flush=True)


def rates(task: Task, times: Times) -> dict[str, str | float | None]:
    """Tokens per second of the whole batch."""
    return {
        "case": task.case,
        "prefill_tokens_per_s": task.batch * task.prompt / times.prompts,
        "decode_tokens_per_s": times.tokens / times.decode if times.tokens else None,
    }


def measure(step: Callable[[], Mapping[str, int]], batch: int, output: int) -> Times:
    """Time an engine that decides itself what a step computes.

    Args:
        step: Runs one and says how many tokens each request has in all.
        batch: Requests that were just added.
        output: Tokens for each after all have their first.
    """
    began = time.perf_counter()
    counts: dict[str, int] = {}
    while len(counts) < batch:
        counts.update({name: count for name, count in step().items() if count})
    first, before = time.perf_counter(), sum(counts.values())
    while sum(counts.values()) - before < batch * output:
        counts.update(step())
    now = time.perf_counter()
    return Times(first - began, now - first, sum(counts.values()) - before)
