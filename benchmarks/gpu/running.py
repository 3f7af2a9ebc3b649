"""Requests on an engine, step by step, with the time of every step."""

from __future__ import annotations

import time
from typing import NamedTuple, Self

from vllm_core import Engine
from vllm_traits import Request, SamplingParams

from benchmarks.gpu.requests import Workload
from benchmarks.gpu.stages import Clock


class Times(NamedTuple):
    """Of some steps.

    Attributes:
        tokens: That were made.
        steps: Seconds of each.
    """

    tokens: int
    steps: list[float]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.steps)


class Running:
    """Requests that all arrive at once; leaving the context aborts what is left of them.

    Args:
        engine: Idle; goes on afterwards.
        work: The requests; sampled, each with a seed of its own, and not ended by a token.
        clock: Says when to give up.
    """

    def __init__(self, engine: Engine, work: Workload, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._names = [str(number) for number in range(len(work.prompts))]
        for name, ids, output in zip(self._names, work.prompts, work.outputs, strict=True):
            params = SamplingParams(
                temperature=1.0, seed=int(name), max_tokens=output, ignore_eos=True
            )
            self._engine.add(Request(name, ids, params))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine.is_dead:
            return
        for name in self._names:
            self._engine.abort(name)
        while self._engine.has_work():
            self._engine.step()

    def begin(self) -> Times:
        """Until every request has its first token, as far as all run at once.

        Raises:
            RuntimeError: A request failed.
            TimeoutError: Time is up.
        """
        begun: set[str] = set()
        tokens, steps = 0, list[float]()
        while len(begun) < len(self._names) and self._engine.has_work():
            seconds, made = self._step()
            begun |= made.keys()
            tokens += sum(made.values())
            steps.append(seconds)
        return Times(tokens, steps)

    def go_on(self, most: int | None = None) -> Times:
        """So many steps, or until all requests are done.

        Raises:
            RuntimeError: A request failed.
            TimeoutError: Time is up.
        """
        tokens, steps = 0, list[float]()
        while self._engine.has_work() and (most is None or len(steps) < most):
            seconds, made = self._step()
            tokens += sum(made.values())
            steps.append(seconds)
        return Times(tokens, steps)

    def _step(self) -> tuple[float, dict[str, int]]:
        """Its time, and the tokens it made by request."""
        self._clock.check()
        began = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - began
        made: dict[str, int] = {}
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.token_ids:
                made[output.request_id] = made.get(output.request_id, 0) + len(output.token_ids)
        return seconds, made
