"""The step loop and its fault boundary."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from core_tools import INFO, Clock, ask, finish, last, reasons, said
from vllm_core import Engine, SchedulerConfig
from vllm_core.testing import DelayedBackend, DictStore, FakeBackend, SimBackend, next_token
from vllm_traits import (
    BackendError,
    FinishReason,
    PoolingParams,
    Request,
    SamplingParams,
    TokenLogprobs,
)

EXAMPLE = '''
from vllm_core import Engine
from vllm_traits import BackendInfo, Batch, BatchOutput, Done, Request, SamplingParams

class Counting:
    """Answers every sequence with its own length."""
    info = BackendInfo(num_blocks=64, block_size=16, max_model_len=512, vocab_size=1000)
    stores = ()
    def forward(self, batch: Batch) -> Done:
        return Done(BatchOutput({c.seq_id: (c.start + c.num_tokens,) for c in batch.chunks if c.sample}))
    def close(self) -> None: ...

engine = Engine(Counting())
engine.add(Request("hello", (1, 2, 3), SamplingParams(max_tokens=5)))
while engine.has_work():
    for output in engine.step():
        print(output)
'''  # noqa: E501 - as it stands in the documents


def test_the_embedders_example_runs_as_it_stands_and_loads_nothing_heavy() -> None:
    check = "import sys; assert not {'torch', 'numpy'} & set(sys.modules), 'heavy imports'"
    ran = subprocess.run(
        [sys.executable, "-c", EXAMPLE + check], capture_output=True, text=True, check=True
    )
    lines = ran.stdout.splitlines()
    assert [f"token_ids=({length},)" in line for length, line in enumerate(lines, 3)] == [True] * 5
    assert "LENGTH" in lines[-1]


class Broken:
    """A grammar that allows everything and raises where it is told to."""

    def __init__(self, in_mask: bool) -> None:
        self._in_mask = in_mask
        self._calls = 0

    def mask(self) -> bytes:
        self._calls += 1
        if self._in_mask and self._calls == 3:
            raise RuntimeError("no mask")
        return b"\xff" * 8

    def accept(self, token_id: int) -> None:
        if not self._in_mask and self._calls == 3:
            raise RuntimeError("no way on")


def sim(**changes: Any) -> SimBackend:
    return SimBackend(replace(INFO, **({"max_sequences": 64, "num_blocks": 256} | changes)))


def thirty_two(**special: Any) -> list[Request]:
    """Requests of which number 13 is special."""
    return [
        ask(str(n), (n + 1, 2, 3), max_tokens=9, ignore_eos=True, **(special if n == 13 else {}))
        for n in range(32)
    ]


def run(backend: Any, requests: list[Request], **config: Any) -> list[Any]:
    engine = Engine(backend, SchedulerConfig(**config))
    for request in requests:
        engine.add(request)
    return finish(engine)


def only_13_failed(outputs: list[Any], code: str) -> None:
    expected = run(sim(), thirty_two())
    for number in range(32):
        name = str(number)
        if number == 13:
            assert last(outputs, name).error == code
            assert last(outputs, name).finish_reason is FinishReason.ERROR
            assert said(expected, name)[: len(said(outputs, name))] == said(outputs, name)
        else:
            assert said(outputs, name) == said(expected, name)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("delay", [0, 1, 3])
def test_one_failed_row_of_32_ends_alone(overlap: bool, delay: int) -> None:
    def fail(number: int, chunk: Any) -> str | None:
        return "nan_logits" if number == 4 and chunk.seq_id == 13 else None

    backend = DelayedBackend(sim(), delay, fail_row=fail)
    only_13_failed(run(backend, thirty_two(), overlap=overlap), "nan_logits")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("in_mask", [False, True])
def test_one_broken_grammar_of_32_ends_alone(overlap: bool, in_mask: bool) -> None:
    requests = thirty_two(grammar=Broken(in_mask))
    only_13_failed(run(sim(), requests, overlap=overlap), "grammar_error")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_row_without_an_answer_ends_alone(overlap: bool) -> None:
    class Forgetful(SimBackend):
        def answer(self, batch: Any, masks: Any) -> Any:
            output = super().answer(batch, masks)
            if batch.step == 4:
                kept = {k: v for k, v in output.token_ids.items() if k != 13}
                return replace(output, token_ids=kept)
            return output

    backend = Forgetful(sim().info)
    only_13_failed(run(backend, thirty_two(), overlap=overlap), "internal_error")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("where", ["fail_forward", "fail_result"])
def test_a_failed_batch_restarts_everybody_but_the_newest(overlap: bool, where: str) -> None:
    backend = DelayedBackend(sim(), **{where: {5}})
    engine = Engine(backend, SchedulerConfig(overlap=overlap))
    for request in thirty_two():
        engine.add(request)
    outputs = finish(engine)
    assert isinstance(engine.fault, BackendError) and not engine.is_dead
    assert engine.stats.batch_faults == 1
    expected = run(sim(), thirty_two())
    assert last(outputs, "31").error == "engine_unavailable"
    for number in range(31):
        assert said(outputs, str(number)) == said(expected, str(number))


def test_those_that_started_in_the_failed_batch_are_the_suspects() -> None:
    engine = Engine(DelayedBackend(sim(), fail_forward={4}), SchedulerConfig(overlap=False))
    engine.add(ask("old", max_tokens=9))
    outputs = [*engine.step(), *engine.step(), *engine.step()]
    engine.add(ask("new1", (9, 9)))
    engine.add(ask("new2", (8, 8)))
    outputs += finish(engine)
    assert reasons(outputs) | {"old": None} == {
        "old": None,
        "new1": FinishReason.ERROR,
        "new2": FinishReason.ERROR,
    }
    assert last(outputs, "old").finish_reason is not FinishReason.ERROR


def test_a_batch_that_fails_again_ends_everything_and_the_engine() -> None:
    engine = Engine(DelayedBackend(sim(), fail_forward={3, 4}))
    for request in thirty_two():
        engine.add(request)
    outputs = finish(engine)
    assert set(reasons(outputs).values()) == {FinishReason.ERROR} and len(reasons(outputs)) == 32
    assert engine.is_dead
    with pytest.raises(BackendError, match="twice"):
        engine.step()
    with pytest.raises(BackendError):
        engine.add(ask("late"))


def test_a_single_request_that_always_fails_its_batch_does_not_kill_the_engine() -> None:
    engine = Engine(DelayedBackend(sim(), fail_forward={1}))
    engine.add(ask("poison"))
    assert last(finish(engine), "poison").error == "engine_unavailable"
    engine.add(ask("next", max_tokens=2))
    assert last(finish(engine), "next").finish_reason is FinishReason.LENGTH


def test_outputs_confirmed_before_a_fault_in_the_same_step_are_not_lost() -> None:
    class NoSample(SimBackend):
        def forward(self, batch: Any) -> Any:
            handle = super().forward(batch)
            if batch.step == 3:
                self.rows.clear()
                return type("Bad", (), {"sample": lambda self, masks: 1 / 0})()
            return handle

    engine = Engine(NoSample(sim().info))
    engine.add(ask("a", max_tokens=6, ignore_eos=True))
    engine.add(ask("b", (9, 9), max_tokens=6, ignore_eos=True))
    outputs = engine.step() + engine.step() + engine.step()
    assert len(said(outputs, "a")) == 2


@pytest.mark.parametrize("state", ["waiting", "running", "in flight", "finished", "unknown"])
def test_abort_is_legal_and_idempotent_in_every_state(state: str) -> None:
    engine = Engine(sim(max_sequences=1), SchedulerConfig(overlap=state == "in flight"))
    engine.add(ask("other", (9,), max_tokens=3) if state == "waiting" else ask("a", max_tokens=9))
    outputs = engine.step()
    if state == "waiting":
        engine.add(ask("a"))
    if state == "finished":
        outputs += finish(engine)
    name = "nobody" if state == "unknown" else "a"
    engine.abort(name)
    engine.abort(name)
    outputs += finish(engine)
    expected = FinishReason.ABORT if state in ("waiting", "running", "in flight") else None
    if expected is not None:
        assert last(outputs, name).finish_reason is expected
    else:
        assert FinishReason.ABORT not in reasons(outputs).values()
    assert engine.scheduler.cache.pool.num_available == 256


def test_a_request_aborted_while_its_prefix_loads_keeps_the_blocks_until_the_copy_is_done() -> None:
    contents: dict[bytes, list[int]] = {}
    run_with = [SimBackend(INFO, [DictStore(1, contents)]) for _ in range(1)]
    run(run_with[0], [ask("a", 17, max_tokens=1)])
    backend = SimBackend(INFO, [DictStore(9, contents)])
    engine = Engine(backend)
    engine.add(ask("b", 17, max_tokens=1))
    engine.step()
    assert engine.scheduler.is_copying
    engine.abort("b")
    pool = engine.scheduler.cache.pool
    assert pool.num_available == 60 and not pool.block_of
    assert last(finish(engine), "b").finish_reason is FinishReason.ABORT
    assert pool.num_available == 64 and not pool.block_of, "nothing is published"


def test_logprobs_stay_aligned_when_a_stop_cuts_accepted_drafts() -> None:
    def propose() -> Any:
        return lambda tokens: [next_token([*tokens], 0)] * 1 + [1, 1]

    prompt = (1, 2, 3)
    context = list(prompt)
    for _ in range(6):
        context.append(next_token(context))
    stop = context[5]
    engine = Engine(sim(), propose=propose)
    engine.add(ask("a", prompt, max_tokens=20, logprobs=0, stop_token_ids=frozenset({stop})))
    outputs = finish(engine)
    entries = [entry for output in outputs for entry in output.logprobs]
    assert tuple(entry.token_id for entry in entries) == said(outputs, "a")
    assert last(outputs, "a").stop_token_id == stop == said(outputs, "a")[-1]


def test_prompt_logprobs_come_once_with_the_first_output_across_chunks() -> None:
    engine = Engine(FakeBackend(), SchedulerConfig(max_batch_tokens=16))
    prompt = tuple(range(1, 41))
    engine.add(ask("a", prompt, max_tokens=3, prompt_logprobs=1))
    first, *rest = finish(engine)
    assert first.prompt_logprobs[0] is None
    assert all(isinstance(entry, TokenLogprobs) for entry in first.prompt_logprobs[1:])
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == list(prompt[1:])
    assert not any(output.prompt_logprobs for output in rest)


def test_prompt_logprobs_without_a_completion() -> None:
    engine = Engine(FakeBackend())
    engine.add(ask("a", 6, max_tokens=0, prompt_logprobs=0))
    (output,) = finish(engine)
    assert len(output.prompt_logprobs) == 6 and output.finish_reason is FinishReason.LENGTH


def test_an_embedding_comes_with_the_last_chunk() -> None:
    engine = Engine(FakeBackend(), SchedulerConfig(max_batch_tokens=16))
    engine.add(Request("a", tuple(range(1, 41)), PoolingParams(normalize=False)))
    (output,) = finish(engine)
    assert output.embedding == (5.0,) * 8 and output.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_min_tokens_are_reached_before_end_of_sequence(min_tokens: int) -> None:
    engine = Engine(FakeBackend(lambda prompt: (7, 7)))
    engine.add(Request("a", (1,), SamplingParams(max_tokens=9, min_tokens=min_tokens)))
    outputs = finish(engine)
    assert len(said(outputs, "a")) == max(3, min_tokens + 1)
    assert last(outputs, "a").finish_reason is FinishReason.STOP


def test_end_of_sequence_is_no_stop_token_and_ignore_eos_makes_it_one_if_asked() -> None:
    engine = Engine(FakeBackend(lambda prompt: ()))
    both = SamplingParams(max_tokens=4, stop_token_ids=frozenset({0}))
    engine.add(Request("eos", (1,), both))
    engine.add(Request("stop", (2,), replace(both, ignore_eos=True)))
    engine.add(Request("neither", (3,), SamplingParams(max_tokens=4, ignore_eos=True)))
    outputs = finish(engine)
    assert last(outputs, "eos").stop_token_id is None
    assert last(outputs, "stop").stop_token_id == 0
    assert last(outputs, "neither").finish_reason is FinishReason.LENGTH


def test_a_closed_engine_aborts_what_is_open_and_takes_no_more() -> None:
    backend = FakeBackend()
    engine = Engine(backend)
    engine.add(ask("a"))
    assert reasons(engine.close()) == {"a": FinishReason.ABORT}
    assert backend.is_closed and engine.close() == []
    with pytest.raises(BackendError, match="closed"):
        engine.add(ask("b"))


def test_times_are_those_of_the_injected_clock() -> None:
    clock = Clock()
    engine = Engine(FakeBackend(), SchedulerConfig(overlap=False), clock=clock)
    engine.add(ask("a", max_tokens=3, ignore_eos=True))

    def pass_time() -> None:
        clock.now += 2.0

    finish(engine, pass_time)
    stats = engine.stats
    assert stats.time_to_first_token.sum == 2.0
    assert stats.inter_token_latency.sum == 4.0 and stats.inter_token_latency.count == 2
    assert stats.time_per_output_token.sum == 2.0
    assert stats.e2e_latency.sum == 6.0 and stats.queue_time.sum == 2.0
    assert stats.prefill_time.sum == 0.0 and stats.decode_time.sum == 4.0


def test_received_is_finished_plus_in_flight_at_every_step() -> None:
    engine = Engine(sim(num_blocks=24))
    for request in thirty_two():
        engine.add(request)
    while engine.has_work():
        engine.step()
        stats = engine.stats
        assert stats.received == sum(stats.finished.values()) + stats.num_in_flight
        assert stats.num_in_flight == stats.num_running + stats.num_waiting
        assert 0.0 <= stats.kv_usage <= 1.0
    assert stats.preemptions > 0
    assert stats.generation_tokens == 32 * 9
    assert stats.request_generation_tokens.count == 32


def test_a_copy_of_the_statistics_does_not_change_any_more() -> None:
    engine = Engine(FakeBackend())
    before = engine.stats
    engine.add(ask("a"))
    finish(engine)
    assert before.received == 0 and before.time_to_first_token.count == 0
    assert sum(before.finished.values()) == 0
    after = dict(engine.stats.histograms())
    assert after["time_to_first_token"].count == 1 and len(after) == 14


def test_a_reader_that_has_enough_ends_its_request_as_stopped() -> None:
    engine = Engine(SimBackend(INFO))
    engine.add(ask("a", 5, max_tokens=20))
    engine.step()
    engine.abort("a", FinishReason.STOP)
    [output] = [each for each in finish(engine) if each.finished]
    assert output.finish_reason is FinishReason.STOP
    assert engine.stats.finished[FinishReason.STOP] == 1
