"""Figures of a load run: percentiles, throughput, goodput, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

PERCENTILES = (90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")


@dataclass(slots=True)
class Result:
    """What one request saw.

    Attributes:
        start: Seconds on a monotonic clock when it was sent.
        end: When its answer was complete.
        times: When each piece of text arrived.
        num_prompt_tokens: As the server says; 0 if it does not.
        num_output_tokens: As the server says, else the pieces counted.
        error: Class of what went wrong, such as `http_503`; empty for success.
    """

    start: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list[float])
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    def latencies(self) -> dict[str, float]:
        """Milliseconds to the first token, per token after it, and in all."""
        found = {"e2e": (self.end - self.start) * 1e3}
        if self.times:
            found["ttft"] = (self.times[0] - self.start) * 1e3
        if self.times and self.num_output_tokens > 1:
            found["tpot"] = (self.times[-1] - self.times[0]) * 1e3 / (self.num_output_tokens - 1)
        return found

    def gaps(self) -> list[float]:
        """Milliseconds between neighbouring pieces."""
        return [(b - a) * 1e3 for a, b in pairwise(self.times)]


class Distribution(NamedTuple):
    """Mean, median and tail of some milliseconds."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float


def distribution(values: Sequence[float]) -> Distribution | None:
    """Of no values there is none."""
    if not values:
        return None
    ordered = sorted(values)
    tail = (percentile(ordered, p) for p in PERCENTILES)
    return Distribution(statistics.fmean(ordered), percentile(ordered, 50), *tail)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of sorted values."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of a run.

    Attributes:
        setting: What was asked for, copied into the JSON.
        seconds: From the first request to the last answer.
        results: One per request.
        goals: Limits in milliseconds by latency name; requests within all of them are good.
    """

    setting: Mapping[str, Any]
    seconds: float
    results: Sequence[Result]
    goals: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def completed(self) -> list[Result]:
        """Requests without an error."""
        return [r for r in self.results if not r.error]

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        done = self.completed
        latencies = {name: distribution(v) for name, v in self._latencies().items()}
        output = sum(r.num_output_tokens for r in done)
        total = output + sum(r.num_prompt_tokens for r in done)
        figures: dict[str, Any] = {
            "setting": dict(self.setting),
            "seconds": self.seconds,
            "completed": len(done),
            "failed": len(self.results) - len(done),
            "errors": dict(Counter(r.error for r in self.results if r.error)),
            "prompt_tokens": total - output,
            "output_tokens": output,
            "requests_per_second": len(done) / self.seconds,
            "output_tokens_per_second": output / self.seconds,
            "total_tokens_per_second": total / self.seconds,
        }
        for name, spread in latencies.items():
            figures[f"{name}_ms"] = spread._asdict() if spread else None
        if self.goals:
            figures["goals_ms"] = dict(self.goals)
            figures["goodput_requests_per_second"] = self._num_good() / self.seconds
        return figures

    def _latencies(self) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {name: [] for name in LATENCIES}
        for result in self.completed:
            for name, milliseconds in result.latencies().items():
                values[name].append(milliseconds)
            values["itl"] += result.gaps()
        return values

    def _num_good(self) -> int:
        return sum(
            all(r.latencies().get(name, 0.0) <= limit for name, limit in self.goals.items())
            for r in self.completed
        )

    def as_table(self) -> str:
        """For people."""
        figures = self.as_json()
        rows = [
            ("requests completed / failed", f"{figures['completed']} / {figures['failed']}"),
            ("duration", f"{self.seconds:.2f} s"),
            ("prompt / output tokens", f"{figures['prompt_tokens']} / {figures['output_tokens']}"),
            ("requests per second", f"{figures['requests_per_second']:.2f}"),
            ("output tokens per second", f"{figures['output_tokens_per_second']:.1f}"),
            ("total tokens per second", f"{figures['total_tokens_per_second']:.1f}"),
        ]
        if self.goals:
            goals = " ".join(f"{name}:{limit:g}" for name, limit in self.goals.items())
            good = figures["goodput_requests_per_second"]
            rows.append((f"goodput ({goals})", f"{good:.2f} requests per second"))
        rows += [(f"error {name}", str(count)) for name, count in figures["errors"].items()]
        lines = [f"{name:<32}{value:>24}" for name, value in rows]
        header = "".join(f"{word:>10}" for word in Distribution._fields)
        lines += ["", f"{'milliseconds':<14}{header}"]
        for name in LATENCIES:
            spread = figures[f"{name}_ms"]
            cells = (
                "".join(f"{value:>10.2f}" for value in spread.values()) if spread else "         –"
            )
            lines.append(f"{name.upper():<14}{cells}")
        return "\n".join(lines)


def parse_goals(words: Sequence[str]) -> dict[str, float]:
    """`["ttft:200", "tpot:50"]` as limits in milliseconds.

    Raises:
        ValueError: A word has another shape or names another latency.
    """
    goals: dict[str, float] = {}
    for word in words:
        name, _, limit = word.partition(":")
        if name not in ("ttft", "tpot", "e2e"):
            raise ValueError(f"a goal is ttft:MS, tpot:MS or e2e:MS, not {word!r}")
        goals[name] = float(limit)
    return goals
