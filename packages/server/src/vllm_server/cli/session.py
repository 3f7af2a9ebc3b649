"""Loads a model for a command showing how that goes."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from vllm_server.config import Settings
from vllm_server.local import LocalEngine
from vllm_server.progress import shown_progress


@contextlib.contextmanager
def open_engine(settings: Settings) -> Generator[LocalEngine]:
    """A model in this process, with a progress bar on a terminal; closed at the end."""
    with shown_progress() as on_progress:
        engine = LocalEngine.load(settings, on_progress)
    with engine:
        yield engine
