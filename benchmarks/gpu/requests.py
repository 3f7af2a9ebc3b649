"""The requests of the throughput runs: lengths, and token ids that nobody tokenized."""

from __future__ import annotations

import random
from typing import NamedTuple

_LARGEST_ID = 10_000


class Workload(NamedTuple):
    """Requests that all arrive at once.

    Attributes:
        name: In tables.
        prompts: Token ids of each.
        outputs: Tokens that each is to make.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]

    @property
    def num_output_tokens(self) -> int:
        """Of all requests."""
        return sum(self.outputs)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(p) + o for p, o in zip(self.prompts, self.outputs, strict=True))

    def first(self, count: int, name: str) -> Workload:
        """Some of them, under another name."""
        return Workload(name, self.prompts[:count], self.outputs[:count])


def nano(count: int = 256, shortest: int = 100, longest: int = 1024) -> Workload:
    """What nano-vllm's bench draws: seed 0, prompts and outputs of 100 to 1024 tokens, where ids
    and lengths come from one stream."""
    source = random.Random(0)
    prompts = tuple(
        tuple(source.randint(0, _LARGEST_ID) for _ in range(source.randint(shortest, longest)))
        for _ in range(count)
    )
    return Workload("nano", prompts, tuple(source.randint(shortest, longest) for _ in range(count)))


def long_outputs(count: int = 256, prompt: int = 16, output: int = 1024) -> Workload:
    """Short prompts, and outputs of the same length."""
    source = random.Random(1)
    ids = range(_LARGEST_ID)
    prompts = tuple(tuple(source.choices(ids, k=prompt)) for _ in range(count))
    return Workload("16 in, 1024 out", prompts, (output,) * count)


def within(workload: Workload, vocab_size: int) -> Workload:
    """The same lengths for a model with fewer tokens."""
    prompts = tuple(tuple(token % vocab_size for token in ids) for ids in workload.prompts)
    return workload._replace(prompts=prompts)
