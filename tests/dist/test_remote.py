"""The two ends of a channel in one process: order of calls, faults and bad frames."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import pytest
from vllm_core.testing import FakeBackend
from vllm_core.testing.fake import INFO
from vllm_dist import Channel, RemoteBackend, serve_backend
from vllm_traits import (
    EMPTY,
    BackendError,
    Batch,
    BatchOutput,
    Chunk,
    SamplingParams,
    Start,
    WireError,
)
from vllm_traits.wire import encode_info, encode_masks, encode_output


def decode_step(step: int) -> Batch:
    return Batch((Chunk(1, step, 1),), step=step)


class Recorder:
    """Notes the calls; a batch is done once the next one was launched, or when told so."""

    info = INFO
    stores = ()

    def __init__(self, last_step: int) -> None:
        self.calls: list[tuple[str, int]] = []
        self.threads: set[int] = set()
        self.newest = 0
        self.last_step = last_step

    def forward(self, batch: Batch) -> RecordedInFlight:
        self.note("forward", batch.step)
        if batch.step == 13:
            raise ValueError("an unlucky batch")
        self.newest = batch.step
        return RecordedInFlight(self, batch.step)

    def note(self, call: str, step: int) -> None:
        self.calls.append((call, step))
        self.threads.add(threading.get_ident())

    def close(self) -> None:
        self.note("close", 0)


class RecordedInFlight:
    def __init__(self, backend: Recorder, step: int) -> None:
        self.backend = backend
        self.step = step

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        self.backend.note("sample", self.step)

    def done(self) -> bool:
        return self.backend.newest > self.step or self.step == self.backend.last_step

    def result(self) -> BatchOutput:
        assert self.done(), "the loop must not wait for a batch that is not done"
        self.backend.note("result", self.step)
        return BatchOutput({1: (self.step,)})


@contextmanager
def served(backend: Any) -> Iterator[RemoteBackend]:
    """A backend behind a pair of sockets, served by a thread of this process."""
    ours, theirs = (Channel(each) for each in socket.socketpair())
    server = threading.Thread(target=serve_backend, args=(backend, theirs))
    server.start()
    try:
        with closing(RemoteBackend(ours, 20)) as remote:
            yield remote
    finally:
        server.join(20)
    assert not server.is_alive()


def test_the_next_batch_is_launched_while_one_is_in_flight() -> None:
    backend = Recorder(last_step=3)
    with served(backend) as remote:
        assert remote.info == INFO
        first = remote.forward(decode_step(1))
        first.sample()
        second = remote.forward(decode_step(2))  # the first is done only now
        assert first.result().token_ids == {1: (1,)}
        second.sample()
        third = remote.forward(decode_step(3))
        assert second.result().token_ids == {1: (2,)}
        third.sample()
        assert third.result().token_ids == {1: (3,)}
        assert third.done()
    assert len(backend.threads) == 1
    assert backend.calls[-1] == ("close", 0)


def test_a_batch_may_be_launched_before_the_one_before_it_is_sampled() -> None:
    backend = Recorder(last_step=2)
    with served(backend) as remote:
        first, second = remote.forward(decode_step(1)), remote.forward(decode_step(2))
        first.sample()
        second.sample()
        assert second.result().token_ids == {1: (2,)}
        assert first.result().token_ids == {1: (1,)}
    launches = [call for call in backend.calls if call[0] in ("forward", "sample")]
    assert launches == [("forward", 1), ("forward", 2), ("sample", 1), ("sample", 2)]


def test_a_launch_that_raises_fails_its_batch_alone() -> None:
    with served(Recorder(last_step=14)) as remote:
        unlucky = remote.forward(decode_step(13))
        unlucky.sample()
        with pytest.raises(BackendError, match="ValueError: an unlucky batch"):
            unlucky.result()
        after = remote.forward(decode_step(14))
        after.sample()
        assert after.result().token_ids == {1: (14,)}


def test_logprobs_and_long_prompts_cross_the_channel() -> None:
    prompt = tuple(index % 1000 for index in range(50_000))
    start = Start(1, prompt, SamplingParams(logprobs=3, prompt_logprobs=2), 0, len(prompt))
    batch = Batch((Chunk(1, 0, len(prompt) - 1, tuple(range(5_000))),), (start,), step=1)
    local = FakeBackend().forward(batch)
    local.sample()
    with served(FakeBackend()) as remote:
        launched = remote.forward(batch)
        launched.sample()
        assert launched.result() == local.result()


def test_what_cannot_be_encoded_is_refused_before_anything_is_sent() -> None:
    with served(Recorder(last_step=1)) as remote:
        with pytest.raises(WireError):
            remote.forward(Batch((Chunk(2**70, 0, 1),), step=1))
        launched = remote.forward(decode_step(1))
        launched.sample()
        assert launched.result().token_ids == {1: (1,)}


@pytest.mark.parametrize(
    "frame",
    [
        b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 20,
        encode_info(INFO),
        encode_masks({}, 1),
        encode_output(BatchOutput({1: (2,)}), 1)[:-1] + b"\xff",
    ],
)
def test_a_server_that_talks_nonsense_loses_its_client(frame: bytes) -> None:
    ours, theirs = (Channel(each) for each in socket.socketpair())
    theirs.send(encode_info(INFO))
    with closing(theirs), closing(RemoteBackend(ours, 20)) as remote:
        launched = remote.forward(decode_step(1))
        theirs.send(frame)
        with pytest.raises(BackendError, match="lost"):
            launched.result()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda channel: channel.send(b"GET / HTTP/1.1\r\n\r\n" + b" " * 20),
        lambda channel: channel.send(encode_info(INFO)),
        lambda channel: channel.close(),
    ],
)
def test_a_client_that_talks_nonsense_is_dropped(spoil: Callable[[Channel], None]) -> None:
    backend = FakeBackend()
    ours, theirs = (Channel(each) for each in socket.socketpair())
    with closing(ours):
        spoil(ours)
        serve_backend(backend, theirs)  # returns, or the test would hang
    assert backend.is_closed


def test_an_answer_to_a_forgotten_batch_is_dropped() -> None:
    ours, theirs = (Channel(each) for each in socket.socketpair())
    theirs.send(encode_info(INFO))
    with closing(theirs), closing(RemoteBackend(ours, 20)) as remote:
        remote.forward(decode_step(1))
        launched = remote.forward(decode_step(2))
        theirs.send(encode_output(BatchOutput({1: (1,)}), 1))
        theirs.send(encode_output(BatchOutput({1: (2,)}), 2))
        assert launched.result().token_ids == {1: (2,)}
