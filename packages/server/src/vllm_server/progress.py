"""Shows how download, load and warm-up advance: bars on a terminal, else a line per 10 %.

Knows nothing of what is loaded; gets `LoadProgress` values from whoever loads.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Generator
from typing import TextIO

from vllm_models.options import LoadProgress, OnProgress

log = logging.getLogger(__name__)


class ProgressLines:
    """A log line whenever another tenth of a stage is done."""

    def __init__(self) -> None:
        self._tenths: dict[str, int] = {}

    def __call__(self, news: LoadProgress) -> None:
        """Take one report."""
        tenth = int(news.fraction * 10)
        if tenth > self._tenths.get(news.stage, -1):
            self._tenths[news.stage] = tenth
            log.info("%s %d %% %s", news.stage, round(news.fraction * 100), news.detail)


class ProgressBars:
    """One bar per stage on a terminal; a context manager that leaves the terminal clean."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} % {task.fields[detail]}"),
            TimeElapsedColumn(),
            console=Console(file=stream),
            transient=True,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, news: LoadProgress) -> None:
        """Take one report."""
        if news.stage not in self._tasks:
            self._tasks[news.stage] = self._bars.add_task(news.stage, total=1.0, detail="")
        task = self._tasks[news.stage]
        self._bars.update(task, completed=news.fraction, detail=news.detail)  # pyright: ignore[reportArgumentType]


class Stopwatch:
    """Passes reports on and notes how long each stage took; what comes before is `import`."""

    def __init__(self, show: OnProgress) -> None:
        self._show = show
        self._stage = "import"
        self._since = time.monotonic()
        self.seconds: dict[str, float] = {}

    def __call__(self, news: LoadProgress) -> None:
        """Take one report."""
        self.stop()
        self._stage = news.stage
        self._show(news)

    def stop(self) -> None:
        """Count the time since the last report."""
        now = time.monotonic()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since = now


@contextlib.contextmanager
def shown_progress() -> Generator[OnProgress]:
    """Takes progress reports: bars on a terminal, log lines elsewhere."""
    if sys.stderr.isatty():
        with ProgressBars(sys.stderr) as bars:
            yield bars
    else:
        yield ProgressLines()
