"""A command as stages that each have a deadline: a row is kept the moment it is known, so that a
run that is cut short loses no more than the row at hand.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.cpu.rows import Figure, report

TIME_IS_UP = "time is up"


class Clock:
    """How much time is left.

    Args:
        seconds: From now on.
        now: Monotonic seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - self._now()

    def part(self, seconds: float) -> Clock:
        """A clock for so long at most."""
        return Clock(min(seconds, self.left), self._now)

    def check(self) -> None:
        """Raise if nothing is left.

        Raises:
            TimeoutError: It is over.
        """
        if self.left <= 0:
            raise TimeoutError(TIME_IS_UP)


class Stage(NamedTuple):
    """One part of a command.

    Attributes:
        name: In every row.
        seconds: It may take.
        figures: Yields rows, given the time it has; raises TimeoutError if that is over.
    """

    name: str
    seconds: float
    figures: Callable[[Clock], Iterable[Figure]]


class Book:
    """The file of a command's rows.

    Args:
        path: Of the JSON lines.
        about: What is said of the run; has its id under `run`.
    """

    def __init__(self, path: Path, about: Figure) -> None:
        self.path = path
        self._run = about["run"]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"about": about})

    def run(self, stages: Iterable[Stage], clock: Clock) -> None:
        """All stages that there is time for, one table after the other."""
        for stage in stages:
            print(f"\n{stage.name} ({max(0.0, min(stage.seconds, clock.left)):.0f} s)", flush=True)
            report(self._kept(stage, clock), None)

    def _kept(self, stage: Stage, clock: Clock) -> Iterator[Figure]:
        began = time.perf_counter()
        for figure in _until(stage, clock):
            self._append({"run": self._run, "stage": stage.name, **figure})
            yield figure
        seconds = round(time.perf_counter() - began, 3)
        self._append({"run": self._run, "stage": stage.name, "seconds": seconds})

    def _append(self, line: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _until(stage: Stage, clock: Clock) -> Iterator[Figure]:
    """The rows of a stage, and one that says why it ended if it did not finish."""
    own = clock.part(stage.seconds)
    try:
        own.check()
        for figure in stage.figures(own):
            yield figure
            own.check()
    except TimeoutError as reason:
        yield {"cut": str(reason)}
    except Exception as fault:  # noqa: BLE001 - the stages that follow still have their turn
        yield {"failed": f"{type(fault).__name__}: {fault}"[:500]}
