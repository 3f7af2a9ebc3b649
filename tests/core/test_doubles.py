"""The shipped doubles keep the protocol themselves."""

from __future__ import annotations

import pytest
from core_tools import INFO, ask, finish, said
from vllm_core import Engine, SchedulerConfig
from vllm_core.testing import DelayedBackend, FakeBackend, SimBackend
from vllm_traits import Batch, Chunk, Done, SamplingParams, Start


def batch(step: int = 1) -> Batch:
    start = Start(1, (1, 2, 3), SamplingParams(), 0, 3)
    return Batch((Chunk(1, 0, 3, (0,)),), (start,), (), step)


class OnlyToken:
    """Allows one token."""

    def __init__(self, token: int) -> None:
        self._token = token

    def mask(self) -> bytes:
        return (1 << self._token).to_bytes(128, "little")

    def accept(self, token_id: int) -> None:
        assert token_id == self._token


@pytest.mark.parametrize("overlap", [False, True])
def test_the_fake_obeys_masks(overlap: bool) -> None:
    engine = Engine(FakeBackend(), SchedulerConfig(overlap=overlap))
    engine.add(ask("a", grammar=OnlyToken(777)))
    assert said(finish(engine), "a") == (777,) * 4


def test_the_fake_obeys_allowed_tokens() -> None:
    engine = Engine(FakeBackend())
    engine.add(ask("a", (5, 9, 5), allowed_token_ids=(8, 9), ignore_eos=True))
    assert said(finish(engine), "a") == (8, 9, 8, 8)


def test_the_fake_accepts_right_drafts_of_the_host() -> None:
    engine = Engine(FakeBackend(), SchedulerConfig(num_ngram_drafts=3))
    prompt = (1, 2, 3, 4, 5, 6, 7, 8)
    engine.add(ask("a", prompt, max_tokens=9))
    outputs = finish(engine)
    assert said(outputs, "a") == (*prompt, 0)
    assert engine.stats.spec_accepted_tokens > 0 and len(outputs) < 9
    assert sum(engine.stats.spec_accepted_per_position) == engine.stats.spec_accepted_tokens


def test_the_fake_records_batches_if_told_to() -> None:
    backend = FakeBackend(record=True)
    engine = Engine(backend)
    engine.add(ask("a", max_tokens=1))
    finish(engine)
    assert [chunk.num_tokens for each in backend.batches for chunk in each.chunks] == [5]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_delayed_batch_is_done_after_so_many_polls_and_stays_done(delay: int) -> None:
    handle = DelayedBackend(SimBackend(INFO), delay).forward(batch())
    handle.sample()
    polls = [handle.done() for _ in range(delay + 2)]
    assert polls == [False] * delay + [True] * (len(polls) - delay)
    assert handle.result().token_ids.keys() == {1}


def test_a_delayed_result_can_be_had_at_once() -> None:
    handle = DelayedBackend(SimBackend(INFO), 3).forward(batch())
    handle.sample()
    assert len(handle.result().token_ids[1]) == 1


def test_the_simulation_notices_a_second_start_and_a_step_that_goes_back() -> None:
    backend = SimBackend(INFO)
    backend.forward(batch(2))
    with pytest.raises(AssertionError, match="twice"):
        backend.forward(batch(3))
    with pytest.raises(AssertionError, match="count up"):
        backend.forward(batch(1))


def test_done_is_a_batch_that_is_finished_when_launched() -> None:
    handle = SimBackend(INFO).forward(batch())
    handle.sample()
    done = Done(handle.result())
    done.sample()
    assert done.done() and done.result() is handle.result()
