"""Times and figures: the median of a few short runs, printed as a table or as JSON lines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

Figure = dict[str, str | int | float]


def seconds(run: Callable[[], object], rounds: int = 7) -> float:
    """The median time of one run, after one that does not count."""
    run()
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def report(figures: Iterable[Figure], path: Path | None) -> None:
    """Print a Markdown table row by row as figures arrive, and append JSON lines to a file."""
    head: list[str] = []
    for figure in figures:
        if head != list(figure):
            head = list(figure)
            print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        print(f"| {' | '.join(_cell(value) for value in figure.values())} |", flush=True)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(figure) + "\n")


def _cell(value: str | int | float) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
