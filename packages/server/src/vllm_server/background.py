"""Work on a thread that nobody has to wait for when the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_background(work: Callable[[], Result], name: str) -> Future[Result]:
    """Run work on a daemon thread of its own; an executor's threads would hold up the exit.

    Args:
        work: What it raises is raised where the result is read.
        name: Of the thread.
    """
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed on, not handled
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
