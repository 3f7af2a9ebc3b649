"""Finds the name somebody meant, and ends the sentence that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name nearest to a wrong one, or nothing."""
    by_plain = {_plain(k): k for k in known}
    found = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.6)
    return f"; did you mean {by_plain[found[0]]}?" if found else ""


def sentence(text: str) -> str:
    """The text with a full stop, unless it ends with a question already."""
    return text if text.endswith("?") else f"{text}."


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")
