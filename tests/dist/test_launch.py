"""A backend in a child process: the same tokens, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from dist_factories import info
from vllm_core import Engine, SchedulerConfig
from vllm_core.testing import SimBackend
from vllm_dist import RemoteBackend, launch_backend
from vllm_traits import (
    BackendError,
    Batch,
    Chunk,
    FinishReason,
    ModelBackend,
    PoolingParams,
    Request,
    RequestOutput,
    SamplingParams,
    Start,
)


class ParityGrammar:
    """Allows even and odd tokens in turn."""

    def __init__(self) -> None:
        self._accepted = 0

    def mask(self) -> bytes:
        bits = sum(1 << token for token in range(2, 64) if token % 2 == self._accepted % 2)
        return bits.to_bytes(8, "little")

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self._accepted % 2
        self._accepted += 1


def requests() -> list[Request]:
    """Completions, two in three of them under a grammar, and one embedding."""
    asked = [
        Request(
            str(number),
            tuple(range(1, 4 + number)),
            SamplingParams(seed=number, max_tokens=20, logprobs=0, ignore_eos=True),
            grammar=ParityGrammar() if number % 3 else None,
        )
        for number in range(8)
    ]
    return [*asked, Request("vector", (1, 2, 3), PoolingParams())]


def run(backend: ModelBackend, overlap: bool) -> dict[str, list[RequestOutput]]:
    """All outputs by request."""
    engine = Engine(backend, SchedulerConfig(overlap=overlap))
    got: dict[str, list[RequestOutput]] = {}
    with closing(engine):
        for request in requests():
            engine.add(request)
        while engine.has_work():
            for output in engine.step():
                got.setdefault(output.request_id, []).append(output)
        assert engine.stats.batch_faults == 0
        assert engine.stats.preemptions > 0
    return got


def process_of(backend: RemoteBackend) -> int:
    return int(backend.info.fingerprint)


@contextmanager
def launched(factory: str, *args: str) -> Iterator[RemoteBackend]:
    """A child that is closed and of which nothing may be left."""
    backend = launch_backend(f"dist_factories:{factory}", args)
    with closing(backend):
        yield backend
    with pytest.raises(ChildProcessError):
        os.waitpid(process_of(backend), os.WNOHANG)


def first_batch(step: int = 1) -> Batch:
    start = Start(step, (1, 2, 3), SamplingParams(), num_prompt_tokens=3)
    return Batch((Chunk(step, 0, 3, (step,)),), (start,), step=step)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_child_process_gives_the_same_outputs(overlap: bool, num_drafts: int) -> None:
    expected = run(SimBackend(info(num_drafts)), overlap)
    with launched("sim", str(num_drafts)) as backend:
        assert process_of(backend) != os.getpid()
        assert run(backend, overlap) == expected
    assert len(expected) == 9


def test_a_batch_that_fails_in_the_child_does_not_end_it() -> None:
    with launched("faulty", "3") as backend:
        engine = Engine(backend)
        for request in requests():
            engine.add(request)
        outputs: list[RequestOutput] = []
        while engine.has_work():
            outputs += engine.step()
        assert engine.stats.batch_faults == 1
        assert "RuntimeError: a kernel failed" in str(engine.fault)
        reasons = [output.finish_reason for output in outputs if output.finished]
        assert len(reasons) == 9
        assert FinishReason.LENGTH in reasons


def test_a_killed_child_fails_what_is_in_flight_and_everything_after() -> None:
    with launched("sim") as backend:
        in_flight = backend.forward(first_batch())  # never sampled, so never answered
        os.kill(process_of(backend), signal.SIGKILL)
        with pytest.raises(BackendError, match="lost"):
            in_flight.result()
        assert in_flight.done()
        with pytest.raises(BackendError):
            backend.forward(first_batch(2))


def test_a_killed_child_ends_every_request_of_an_engine() -> None:
    with launched("sim") as backend:
        engine = Engine(backend)
        for request in requests():
            engine.add(request)
        outputs = engine.step()
        os.kill(process_of(backend), signal.SIGKILL)
        while engine.has_work():
            outputs += engine.step()
        reasons = [output.finish_reason for output in outputs if output.finished]
        assert reasons == [FinishReason.ERROR] * 9
        with pytest.raises(BackendError):
            engine.step()


def test_a_factory_that_fails_says_why() -> None:
    with pytest.raises(BackendError, match="RuntimeError: no weights here"):
        launch_backend("dist_factories:broken")
    with pytest.raises(BackendError, match="ModuleNotFoundError"):
        launch_backend("no_such_module:function")


def test_a_factory_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(BackendError, match="timed out"):
        launch_backend("dist_factories:stuck", start_timeout_s=0.1)


def test_a_child_ends_with_its_killed_parent() -> None:
    """The child inherits the output of its parent: reading to the end waits for both."""
    code = (
        "from vllm_dist import launch_backend; import sys; "
        "backend = launch_backend('dist_factories:sim'); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdin and parent.stdout
        assert parent.stdout.readline() == b"ready\n"
        parent.kill()
        assert parent.stdout.read() == b""
