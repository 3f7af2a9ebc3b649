"""The cases of the comparison, and which of them one process runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import groupby
from typing import NamedTuple

from benchmarks.cpu.runners.plan import Task
from benchmarks.cpu.shapes import EXPERTS, SMALL, TINY, Shape

_LONG = 4096  # tokens; longer prompts have a process of their own, for its memory
_DENSE = ("bf16", "q8_0", "q4_0", "q4_k_m")


class Case(NamedTuple):
    """A model and a task.

    Attributes:
        shape: Of the model.
        weights: bf16, or the type of a GGUF file.
        task: What is measured.
        goals: By engine, the least ratio to it for decoding.
        prefill_goals: The same for prompts.
    """

    shape: Shape
    weights: str
    task: Task
    goals: Mapping[str, float] = {}
    prefill_goals: Mapping[str, float] = {}

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.task.case

    @property
    def group(self) -> tuple[str, str, bool]:
        """Cases of one group share a process."""
        return self.shape.name, self.weights, self.task.prompt > _LONG


_BOTH = ("llama.cpp", "vLLM")
_GOALS = {
    "bf16-1": dict.fromkeys(_BOTH, 1.1),
    "bf16-8": {"vLLM": 1.2},
    "bf16-32": {"vLLM": 1.3},
    "q8_0-1": {"llama.cpp": 1.4},
    "q4_0-1": {"llama.cpp": 1.5},
    "q4_k_m-1": {"llama.cpp": 1.5},
    "q4_k_m-8": {"llama.cpp": 2.0},
    "q4_k_m-32": {"llama.cpp": 4.0},
}


def _all() -> Iterator[Case]:
    for weights in _DENSE:
        for batch in (1, 8, 32):
            name = f"{weights}-{batch}"
            yield Case(SMALL, weights, Task(name, batch, 128, 64), _GOALS.get(name, {}))
    yield Case(SMALL, "bf16", Task("bf16-prefill", 1, 1024, 0), {}, {"vLLM": 1.0})
    yield Case(SMALL, "q4_k_m", Task("q4_k_m-prefill", 1, 1024, 0))
    yield Case(SMALL, "bf16", Task("bf16-8k-1", 1, 8192, 32))
    yield Case(SMALL, "bf16", Task("bf16-8k-8", 8, 8192, 32))
    yield Case(EXPERTS, "q4_k_m", Task("moe-q4_k_m-1", 1, 128, 64), {"llama.cpp": 1.3})
    yield Case(TINY, "bf16", Task("tiny-bf16-2", 2, 8, 4))
    yield Case(TINY, "q8_0", Task("tiny-q8_0-2", 2, 8, 4))


CASES = {case.name: case for case in _all()}


def chosen(patterns: str) -> list[Case]:
    """Cases by names or patterns with commas between; `all` is all but those of the tiny model.

    Raises:
        ValueError: A pattern fits none.
    """
    found: dict[str, Case] = {}
    for pattern in patterns.split(","):
        names = [name for name in CASES if _fits(name, pattern)]
        if not names:
            raise ValueError(f"no case is called {pattern!r}; there are {', '.join(CASES)}")
        found |= {name: CASES[name] for name in names}
    return list(found.values())


def _fits(name: str, pattern: str) -> bool:
    if pattern == "all":
        return not name.startswith("tiny")
    return fnmatchcase(name, pattern)


def grouped(cases: list[Case]) -> list[list[Case]]:
    """Cases by process."""
    ordered = sorted(cases, key=lambda case: case.group)
    return [list(group) for _, group in groupby(ordered, key=lambda case: case.group)]
