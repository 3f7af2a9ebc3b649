"""What a load run asks for: prompts, lengths and arrival times, all drawn from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from vllm_traits import ConfigError

# Ids that every known vocabulary has and that are no special tokens in any of them.
_FIRST_ID, _LAST_ID = 300, 999
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye run word"
)


class Prompt(NamedTuple):
    """One request to be.

    Attributes:
        content: Text, or token ids for exact lengths.
        output_len: Tokens to ask for.
    """

    content: str | list[int]
    output_len: int


@dataclass(frozen=True, slots=True)
class Workload:
    """The shape of a load run.

    Attributes:
        num_prompts: Requests in all.
        dataset: `random` (no shared prefixes), `fixed` (one text, over and over) or a JSON Lines
            file whose lines have `prompt` and may have `output_len`.
        input_len: Tokens per random prompt.
        output_len: Tokens to ask for.
        spread: Lengths are uniform between this much less and the full length, 0 to 1.
        as_ids: Random prompts are token ids; otherwise words of about a token each.
        seed: Makes the run repeatable.
    """

    num_prompts: int = 100
    dataset: str = "random"
    input_len: int = 128
    output_len: int = 64
    spread: float = 0.0
    as_ids: bool = True
    seed: int = 0

    def prompts(self) -> list[Prompt]:
        """All prompts, the same for the same seed.

        Raises:
            ConfigError: The data set cannot be read.
        """
        random_source = random.Random(self.seed)
        if self.dataset == "random":
            return [self._random(random_source) for _ in range(self.num_prompts)]
        if self.dataset == "fixed":
            text = " ".join(random_source.choices(_WORDS.split(), k=self.input_len))
            return [Prompt(text, self.output_len)] * self.num_prompts
        lines = list(_read(Path(self.dataset), self.output_len))
        random_source.shuffle(lines)
        return [lines[i % len(lines)] for i in range(self.num_prompts)]

    def _random(self, source: random.Random) -> Prompt:
        input_len, output_len = (
            max(1, round(length * (1 - self.spread * source.random())))
            for length in (self.input_len, self.output_len)
        )
        if self.as_ids:
            ids = [source.randint(_FIRST_ID, _LAST_ID) for _ in range(input_len)]
            return Prompt(ids, output_len)
        return Prompt(" ".join(source.choices(_WORDS.split(), k=input_len)), output_len)


def _read(path: Path, output_len: int) -> Iterator[Prompt]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"Cannot read the data set {path}: {error.strerror}.") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ConfigError(f"The data set {path} has no lines.")
    for number, line in enumerate(lines, 1):
        try:
            row: object = json.loads(line)
        except ValueError:
            row = None
        fields = cast("dict[str, object]", row) if isinstance(row, dict) else {}
        prompt, length = fields.get("prompt"), fields.get("output_len", output_len)
        if not isinstance(prompt, str) or not isinstance(length, int):
            raise ConfigError(
                f'{path}:{number}: a line must look like {{"prompt": "text", "output_len": 64}}.'
            )
        yield Prompt(prompt, length)


def arrivals(num: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which requests arrive: Poisson, or all at once for rate inf."""
    if rate == float("inf"):
        return [0.0] * num
    source = random.Random(seed)
    now, times = 0.0, list[float]()
    for _ in range(num):
        times.append(now)
        now += source.expovariate(rate)
    return times
