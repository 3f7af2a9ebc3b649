"""The engine on its thread: streams, back-pressure, abort, drain, death."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from core_tools import INFO, ask
from vllm_core import AsyncEngine, RequestStream, SchedulerConfig
from vllm_core.testing import DelayedBackend, FakeBackend, SimBackend
from vllm_traits import (
    BackendError,
    Batch,
    ContextLengthError,
    FinishReason,
    InvalidRequestError,
    QueueFullError,
    RequestOutput,
)

GUARD_S = 30.0  # a hang is a failure; nothing here takes long


class Gated(FakeBackend):
    """Computes only while its gate is open."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.threads: set[str] = set()

    def answer(self, batch: Batch, masks: Any) -> Any:
        self.threads.add(threading.current_thread().name)
        self.entered.set()
        assert self.gate.wait(GUARD_S)
        return super().answer(batch, masks)


@contextmanager
def started(backend: Any = None, **config: Any) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(backend or FakeBackend(), SchedulerConfig(**config))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
        pool = engine._engine.scheduler.cache.pool
        engine._engine.scheduler.cache.sessions.clear()
        assert pool.num_available == len(pool.refs), "blocks leaked"


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), GUARD_S))  # type: ignore[arg-type]


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def test_many_streams_get_their_own_tokens() -> None:
    async def test() -> None:
        with started() as engine:
            streams = [engine.generate(ask(str(n), (n + 1, 2), max_tokens=2)) for n in range(64)]
            for number, outputs in enumerate(await asyncio.gather(*map(read, streams))):
                tokens = [token for output in outputs for token in output.token_ids]
                assert tokens == [number + 1, 2]
                assert [o.finish_reason for o in outputs if o.finished] == [FinishReason.LENGTH]

    run(test)


def test_all_backend_calls_happen_on_one_thread_that_is_not_the_loops() -> None:
    backend = Gated()

    async def test() -> None:
        with started(backend) as engine:
            await asyncio.gather(*(read(engine.generate(ask(str(n)))) for n in range(8)))

    run(test)
    assert backend.threads == {"vllm-engine"}


def test_what_can_never_run_is_refused_at_once() -> None:
    async def test() -> None:
        with started(FakeBackend(info=INFO)) as engine:
            with pytest.raises(ContextLengthError):
                engine.generate(ask("a", tuple([1] * 128)))
            with pytest.raises(InvalidRequestError):
                engine.generate(ask("a", (999,)))
            assert engine.snapshot().received == 0

    run(test)


def test_an_id_in_use_is_a_conflict() -> None:
    backend = Gated()

    async def test() -> None:
        with started(backend) as engine:
            backend.gate.clear()
            stream = engine.generate(ask("a"))
            with pytest.raises(InvalidRequestError) as refused:
                engine.generate(ask("a"))
            assert refused.value.code == "conflict"
            backend.gate.set()
            await read(stream)
            await read(engine.generate(ask("a")))

    run(test)


def test_the_waiting_queue_is_bounded_also_while_the_engine_is_busy() -> None:
    backend = Gated(info=replace(INFO, max_sequences=1))

    async def test() -> None:
        with started(backend, max_waiting=3) as engine:
            backend.gate.clear()
            streams = [engine.generate(ask("first"))]
            await asyncio.to_thread(backend.entered.wait, GUARD_S)
            streams += [engine.generate(ask(str(n))) for n in range(3)]
            with pytest.raises(QueueFullError):
                engine.generate(ask("one too many"))
            snapshot = engine.snapshot()
            assert snapshot.rejected_queue_full == 1 and snapshot.num_in_flight == 4
            backend.gate.set()
            await asyncio.gather(*map(read, streams))

    run(test)


def test_a_slow_reader_pauses_its_own_sequence_and_nobody_else() -> None:
    async def test() -> None:
        with started() as engine:
            slow = engine.generate(ask("slow", max_tokens=2000, ignore_eos=True), max_unread=32)
            first = await anext(slow)
            await read(engine.generate(ask("quick", max_tokens=500, ignore_eos=True)))
            assert slow.mailbox.paused
            made = engine.snapshot().generation_tokens - 500
            assert made <= len(first.token_ids) + 32 + 3, "at most what was in flight is beyond"
            coalesced = await anext(slow)
            assert len(coalesced.token_ids) >= 32
            rest = [token for output in await read(slow) for token in output.token_ids]
            assert len(first.token_ids) + len(coalesced.token_ids) + len(rest) == 2000

    run(test)


def test_an_engine_with_only_paused_requests_rests_and_is_healthy() -> None:
    async def test() -> None:
        with started() as engine:
            slow = engine.generate(ask("slow", max_tokens=2000, ignore_eos=True), max_unread=16)
            while not slow.mailbox.paused or engine.health().stalled_s:
                await asyncio.sleep(0.001)
            steps = engine.health().steps
            await asyncio.sleep(0.01)
            assert engine.health().steps <= steps + 2
            assert engine.health().status == "ok"
            slow.abort()
            assert (await read(slow))[-1].finish_reason is FinishReason.ABORT

    run(test)


def test_without_a_limit_nothing_pauses() -> None:
    async def test() -> None:
        with started() as engine:
            request = ask("a", max_tokens=1000, ignore_eos=True)
            stream = engine.generate(request, max_unread=None)
            assert await engine.drain(GUARD_S)
            (output,) = await read(stream)
            assert len(output.token_ids) == 1000 and output.finished

    run(test)


@pytest.mark.parametrize("how", ["cancel", "aclose", "abort", "by id"])
def test_a_reader_that_leaves_aborts_its_request(how: str) -> None:
    async def test() -> None:
        with started() as engine:
            stream = engine.generate(ask("a", max_tokens=3000, ignore_eos=True))
            await leave(engine, stream, how)
            assert await engine.drain(GUARD_S)
            assert engine.snapshot().finished[FinishReason.ABORT] == 1
            engine.abort("a")  # once more does no harm

    run(test)


async def leave(engine: AsyncEngine, stream: RequestStream, how: str) -> None:
    match how:
        case "cancel":
            task = asyncio.create_task(read_and_then_wait_for_ever(stream))
            while not engine.snapshot().generation_tokens:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        case "aclose":
            async with aclosing(stream):
                await anext(stream)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        case "abort":
            stream.abort()
            assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
        case _:
            await anext(stream)
            engine.abort("a")
            assert (await read(stream))[-1].finish_reason is FinishReason.ABORT


async def read_and_then_wait_for_ever(stream: RequestStream) -> None:
    async for _ in stream:
        pass


def test_a_request_aborted_before_the_engine_saw_it_still_ends() -> None:
    backend = Gated()

    async def test() -> None:
        with started(backend) as engine:
            backend.gate.clear()
            busy = engine.generate(ask("busy"))
            await asyncio.to_thread(backend.entered.wait, GUARD_S)
            stream = engine.generate(ask("a"))
            stream.abort()
            backend.gate.set()
            assert (await read(stream))[-1].finish_reason is FinishReason.ABORT
            await read(busy)

    run(test)


def test_drain_waits_for_running_work_and_gives_up_in_time() -> None:
    backend = Gated()

    async def test() -> None:
        with started(backend) as engine:
            assert await engine.drain(0.0), "nothing is running"
            backend.gate.clear()
            stream = engine.generate(ask("a"))
            assert not await engine.drain(0.01)
            backend.gate.set()
            assert await engine.drain(GUARD_S)
            await read(stream)

    run(test)


def test_close_ends_every_open_stream_and_can_be_repeated() -> None:
    async def test() -> None:
        with started() as engine:
            streams = [
                engine.generate(ask(str(n), max_tokens=3000, ignore_eos=True)) for n in range(4)
            ]
            await anext(streams[0])
            await asyncio.to_thread(engine.close)
            engine.close()
            for outputs in await asyncio.gather(*map(read, streams)):
                assert outputs[-1].finish_reason is FinishReason.ABORT
            assert engine.health().status == "dead"
            with pytest.raises(BackendError, match="closed"):
                engine.generate(ask("late"))

    run(test)


def test_an_engine_that_was_not_started_refuses() -> None:
    engine = AsyncEngine(FakeBackend())
    with pytest.raises(BackendError, match="not started"):
        engine.submit(ask("a"))
    engine.close()


def test_a_dead_backend_ends_every_stream_with_an_error_and_shows_in_health() -> None:
    backend = DelayedBackend(SimBackend(INFO), fail_forward=range(4, 1000))

    async def test() -> None:
        with started(backend) as engine:
            streams = [engine.generate(ask(str(n), (n + 1,), max_tokens=30)) for n in range(4)]
            for outputs in await asyncio.gather(*map(read, streams)):
                assert outputs[-1].finish_reason is FinishReason.ERROR
            while engine.health().status != "dead":
                await asyncio.sleep(0.001)
            assert "twice" in str(engine.health().error)
            with pytest.raises(BackendError, match="twice"):
                engine.generate(ask("late"))

    run(test)


def test_health_tells_a_stuck_backend_from_an_idle_one_without_waiting_for_it() -> None:
    backend = Gated()
    now = [100.0]

    async def test() -> None:
        engine = AsyncEngine(backend, clock=lambda: now[0])
        engine.start()
        assert engine.health().stalled_s == 0.0
        backend.gate.clear()
        stream = engine.generate(ask("a"))
        await asyncio.to_thread(backend.entered.wait, GUARD_S)
        now[0] = 130.0
        assert engine.health().stalled_s == 30.0
        backend.gate.set()
        await read(stream)
        assert await engine.drain(GUARD_S)
        while engine.health().stalled_s:
            await asyncio.sleep(0.001)
        engine.close()

    run(test)


def test_rows_of_wasted_steps_do_not_put_the_engine_to_sleep() -> None:
    """Every row finishes in one step, is wasted in the next, and somebody waits for a row."""

    async def test() -> None:
        with started(FakeBackend(info=replace(INFO, max_sequences=2))) as engine:
            for turn in range(20):
                names = [f"{turn}-{n}" for n in range(5)]
                await asyncio.gather(*(read(engine.generate(ask(name, (3,)))) for name in names))

    run(test)


def test_plain_threads_block_while_they_read_and_can_abort() -> None:
    with started() as engine:
        outputs = list(engine.submit(ask("a", (5, 6), max_tokens=2)))
        assert [token for output in outputs for token in output.token_ids] == [5, 6]
        endless = engine.submit(ask("b", max_tokens=3000, ignore_eos=True))
        next(endless)
        endless.abort()
        assert list(endless)[-1].finish_reason is FinishReason.ABORT
        endless.abort()


def test_a_batch_from_a_plain_thread_is_not_held_up_by_who_is_read_last() -> None:
    with started() as engine:
        request = (ask(str(n), (n + 1,), max_tokens=600, ignore_eos=True) for n in range(8))
        streams = [engine.submit(each, max_unread=None) for each in request]
        for stream in reversed(streams):
            assert sum(len(output.token_ids) for output in stream) == 600


def test_streams_on_several_loops_are_served_by_one_engine() -> None:
    with started() as engine:
        results: list[int] = []

        def own_loop(number: int) -> None:
            outputs = asyncio.run(read_one(engine, number))
            results.append(sum(len(output.token_ids) for output in outputs))

        threads = [threading.Thread(target=own_loop, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD_S)
        assert results == [4, 4, 4, 4]


async def read_one(engine: AsyncEngine, number: int) -> list[RequestOutput]:
    return await read(engine.generate(ask(str(number), (number + 1, 2, 3, 4), max_tokens=4)))


def test_a_loop_that_is_gone_does_not_harm_the_others() -> None:
    with started() as engine:

        async def leave_open() -> None:
            engine.generate(ask("orphan", max_tokens=50, ignore_eos=True), max_unread=None)

        asyncio.run(leave_open())
        assert list(engine.submit(ask("a")))[-1].finished
