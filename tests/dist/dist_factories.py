"""Backends that the tests start in child processes; the fingerprint is the child's process id."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from vllm_core.testing import SimBackend
from vllm_traits import BackendInfo, Batch, BatchOutput


def info(num_drafts: int = 0) -> BackendInfo:
    """A pool so small that sequences are preempted."""
    return BackendInfo(
        num_blocks=16,
        block_size=4,
        max_model_len=64,
        vocab_size=64,
        eos_token_ids=frozenset({50}),
        max_sequences=4,
        max_batch_tokens=16,
        num_drafts=num_drafts,
        fingerprint=str(os.getpid()).encode(),
    )


def sim(num_drafts: str = "0") -> SimBackend:
    return SimBackend(info(int(num_drafts)))


class Faulty(SimBackend):
    """The result of one batch raises."""

    def __init__(self, step: int) -> None:
        super().__init__(info())
        self._step = step

    def answer(self, batch: Batch, masks: Mapping[int, bytes]) -> BatchOutput:
        if batch.step == self._step:
            raise RuntimeError("a kernel failed")
        return super().answer(batch, masks)


def faulty(step: str) -> Faulty:
    return Faulty(int(step))


def broken() -> SimBackend:
    raise RuntimeError("no weights here")


def stuck() -> SimBackend:
    """A model that never finishes loading."""
    threading.Event().wait()
    raise AssertionError("the event is never set")
