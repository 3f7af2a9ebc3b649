"""Small things the core's tests share: a clock, requests, and ways to run an engine to its end."""

from __future__ import annotations

from collections.abc import Callable

from vllm_core import Engine, Scheduler, SchedulerConfig
from vllm_core.testing import violations
from vllm_traits import (
    BackendInfo,
    Batch,
    BatchOutput,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
)

INFO = BackendInfo(
    num_blocks=64,
    block_size=4,
    max_model_len=128,
    vocab_size=64,
    eos_token_ids=frozenset({50}),
    max_sequences=8,
    max_batch_tokens=64,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ask(name: str, prompt: int | tuple[int, ...] = 5, max_tokens: int = 4, **kw: object) -> Request:
    """A request; a number as prompt is its length. Keywords go to where they are known."""
    token_ids = prompt if isinstance(prompt, tuple) else tuple(range(1, prompt + 1))
    outer = {"priority", "salt", "session_id", "adapter", "grammar"}
    params = {key: value for key, value in kw.items() if key not in outer}
    rest = {key: value for key, value in kw.items() if key in outer}
    sampling = SamplingParams(max_tokens=max_tokens, **({"seed": 0} | params))  # type: ignore[arg-type]
    return Request(name, token_ids, sampling, **rest)  # type: ignore[arg-type]


def scheduler(info: BackendInfo = INFO, clock: Clock | None = None, **config: object) -> Scheduler:
    """A scheduler with settings by name."""
    settings = SchedulerConfig(**config)  # type: ignore[arg-type]
    return Scheduler(info, config=settings, clock=clock or Clock())


def answer(batch: Batch, token: int = 7) -> BatchOutput:
    """One token for every chunk that samples; drafts are all wrong."""
    return BatchOutput({chunk.seq_id: (token,) for chunk in batch.chunks if chunk.sample})


def step(it: Scheduler, token: int = 7) -> Batch | None:
    """Schedule and answer at once."""
    batch = it.schedule()
    if batch is not None:
        it.update(answer(batch, token))
    assert not violations(it), violations(it)
    return batch


def run_until_preempted(it: Scheduler) -> list[str]:
    """Who waits after the first preemption, in order."""
    for _ in range(100):
        step(it)
        if it.stats.preemptions:
            return [seq.request.id for seq in it.waiting]
    raise AssertionError("nobody was preempted")


def names(it: Scheduler, batch: Batch | None) -> list[str]:
    """Ids of the requests in a batch that was just planned."""
    if batch is None:
        return []
    return [it.roster.sequences[chunk.seq_id].request.id for chunk in batch.chunks]


def finish(engine: Engine, each_step: Callable[[], None] = lambda: None) -> list[RequestOutput]:
    """Every output until nothing is left to do."""
    outputs: list[RequestOutput] = []
    for _ in range(5000):
        if not engine.has_work():
            return outputs
        each_step()
        outputs += engine.step()
        assert not violations(engine.scheduler), violations(engine.scheduler)
    raise AssertionError("the engine makes no progress")


def said(outputs: list[RequestOutput], name: str) -> tuple[int, ...]:
    """All tokens of a request."""
    return tuple(t for output in outputs if output.request_id == name for t in output.token_ids)


def last(outputs: list[RequestOutput], name: str) -> RequestOutput:
    """The finishing output of a request, of which there must be exactly one."""
    found = [o for o in outputs if o.request_id == name and o.finish_reason is not None]
    assert len(found) == 1, found
    return found[0]


def reasons(outputs: list[RequestOutput]) -> dict[str, FinishReason]:
    """Why each request ended."""
    return {o.request_id: o.finish_reason for o in outputs if o.finish_reason is not None}
