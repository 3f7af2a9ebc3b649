"""Log lines: text with colour on a terminal or JSON, with the request id, repeats rate-limited.

Configures the standard library's root logger once per process; everything else logs through
`logging.getLogger(__name__)`. Knows no HTTP: whoever serves a request sets `request_id`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TextIO

TRACE = 5
LEVELS = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}
_NAMES = {number: word for word, number in LEVELS.items()} | {logging.CRITICAL: "error"}
_COLOURS = {"trace": "2", "debug": "2", "info": "32", "warn": "33", "error": "31"}
_OURS = ("vllm_lite", "vllm_server", "vllm_core", "vllm_models", "vllm_dist")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


def setup(level: str = "info", style: str = "text", stream: TextIO | None = None) -> None:
    """Send every log line of the process to a stream.

    Args:
        level: Least severe line of our own to show; libraries speak from `warn`, or as we do
            from `debug` down.
        style: `text` or `json`.
        stream: Standard error by default.
    """
    target: TextIO = stream or sys.stderr
    handler = _Handler(target)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter(has_colour(target)))
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    number = LEVELS[level]
    root.setLevel(max(number, logging.WARNING) if number > logging.DEBUG else number)
    for name in _OURS:
        logging.getLogger(name).setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def has_colour(stream: TextIO) -> bool:
    """Colour belongs on terminals whose user did not object."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def shows_tracebacks() -> bool:
    """Tracebacks are for those who asked for details."""
    return logging.getLogger("vllm_server").getEffectiveLevel() <= logging.DEBUG


class _Handler(logging.StreamHandler[TextIO]):
    """A log that cannot be written never stops the server."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line: the disk may be full or the reader gone."""


class RepeatFilter(logging.Filter):
    """Lets few warnings and errors of one kind through per minute, and counts the rest.

    A kind is logger, level and message template, so that a storm of one fault with ever different
    details is still one kind. Lines below warning always pass.
    """

    def __init__(self, burst: int = 5, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst = burst
        self._clock = clock
        self._seen: dict[tuple[str, int, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown; the first one after a pause says how many were not."""
        if record.levelno < logging.WARNING:
            return True
        kind = (record.name, record.levelno, str(record.msg)[:200])
        now = self._clock()
        since, count = self._seen.get(kind, (now, 0))
        if now - since >= 60:
            if count > self._burst:
                record.suppressed = count - self._burst
            since, count = now, 0
        if len(self._seen) > 1000:
            self._seen.clear()
        self._seen[kind] = (since, count + 1)
        return count < self._burst


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO  vllm_server.launch: message [request id]`."""

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """One line, plus a traceback if details are asked for."""
        level = _NAMES.get(record.levelno, record.levelname.lower())
        shown = level.upper().ljust(5)
        if self._colour:
            shown = f"\x1b[{_COLOURS.get(level, '0')}m{shown}\x1b[0m"
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {shown} {record.name}: {_message(record)}"
        current = request_id.get()
        return f"{line} [{current}]" if current else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request_id."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON without line breaks."""
        line: dict[str, str] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": _NAMES.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
            "message": _message(record),
        }
        current = request_id.get()
        if current:
            line["request_id"] = current
        return json.dumps(line, ensure_ascii=False)


def _message(record: logging.LogRecord) -> str:
    """Control characters are escaped, so that no text can forge a line."""
    text = "".join(
        c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in record.getMessage()
    )
    suppressed: int = getattr(record, "suppressed", 0)
    if suppressed:
        text += f" ({suppressed} more like this in the last minute)"
    return text + _exception(record)


def _exception(record: logging.LogRecord) -> str:
    """The whole traceback with details, else the error and the line that raised it."""
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    if shows_tracebacks():
        return "\n" + logging.Formatter().formatException(record.exc_info)
    error, trace = record.exc_info[1], record.exc_info[2]
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}" if trace else ""
    return f" | {type(error).__name__}: {str(error)[:500]}{where}"
