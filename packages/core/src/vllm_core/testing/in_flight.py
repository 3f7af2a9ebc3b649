"""A batch of a double: forward has run, sampling runs when asked, exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from vllm_traits import EMPTY, BatchOutput


class SampledOnce:
    """Answers when sampled; waits, if told to, when read.

    Args:
        answer: Samples the batch under the masks.
        seconds: How long reading the result takes.
    """

    def __init__(
        self, answer: Callable[[Mapping[int, bytes]], BatchOutput], seconds: float = 0.0
    ) -> None:
        self._answer = answer
        self._seconds = seconds
        self._output: BatchOutput | None = None

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Sample every chunk that asks for it."""
        assert self._output is None, "sample() was called twice"
        self._output = self._answer(masks)

    def done(self) -> bool:
        """Whether it was sampled."""
        return self._output is not None

    def result(self) -> BatchOutput:
        """What the batch produced."""
        assert self._output is not None, "result() before sample()"
        if self._seconds:
            time.sleep(self._seconds)
        return self._output
