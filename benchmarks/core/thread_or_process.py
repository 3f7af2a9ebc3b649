"""An engine on a thread against one in a child process, behind the same event loop.

The backend sleeps like a device; the loop does per token what a server does (a JSON event).
Reported are the time of a step, tokens per second and how late the loop is. The child speaks JSON
lines over pipes, one line per step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from statistics import mean

from vllm_core import AsyncEngine, Engine
from vllm_core.testing import FakeBackend
from vllm_core.testing.fake import INFO
from vllm_traits import Request, SamplingParams

STEP_SECONDS = 0.010
NUM_TOKENS = 100
Lags = list[float]


def backend() -> FakeBackend:
    """A device that takes a while for each step."""
    return FakeBackend(info=INFO, step_seconds=STEP_SECONDS)


def request(number: int) -> Request:
    """One stream's request."""
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
    return Request(str(number), tuple(range(1, 33)), params, salt=str(number).encode())


def event(name: str, tokens: list[int]) -> bytes:
    """What a server writes for a token."""
    choice = {"index": 0, "delta": {"content": str(tokens)}, "finish_reason": None}
    return json.dumps({"id": name, "object": "chat.completion.chunk", "choices": [choice]}).encode()


async def measure_lag(lags: Lags) -> None:
    """How much later than asked for a timer of 2 ms fires."""
    while True:
        began = time.perf_counter()
        await asyncio.sleep(0.002)
        lags.append(time.perf_counter() - began - 0.002)


async def run(streams: list[AsyncIterator[list[int]]]) -> tuple[float, Lags]:
    """Read every stream to its end."""
    lags: Lags = []
    watch = asyncio.create_task(measure_lag(lags))

    async def read(number: int, stream: AsyncIterator[list[int]]) -> None:
        async for tokens in stream:
            event(str(number), tokens)

    began = time.perf_counter()
    await asyncio.gather(*(read(number, stream) for number, stream in enumerate(streams)))
    seconds = time.perf_counter() - began
    watch.cancel()
    return seconds, lags


async def on_a_thread(num_streams: int) -> tuple[float, Lags]:
    """`AsyncEngine` as it is."""
    engine = AsyncEngine(backend())
    engine.start()

    async def tokens(number: int) -> AsyncIterator[list[int]]:
        async for output in engine.generate(request(number)):
            yield list(output.token_ids)

    try:
        return await run([tokens(number) for number in range(num_streams)])
    finally:
        engine.close()


async def in_a_process(num_streams: int) -> tuple[float, Lags]:
    """The same engine behind pipes."""
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.core.thread_or_process", "--child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    assert child.stdin is not None and child.stdout is not None
    await child.stdout.readline()  # it is up
    queues: list[asyncio.Queue[list[int] | None]] = [asyncio.Queue() for _ in range(num_streams)]

    async def dispatch(lines: asyncio.StreamReader) -> None:
        while line := await lines.readline():
            for name, tokens, finished in json.loads(line):
                queues[int(name)].put_nowait(tokens)
                if finished:
                    queues[int(name)].put_nowait(None)

    async def tokens(queue: asyncio.Queue[list[int] | None]) -> AsyncIterator[list[int]]:
        while (each := await queue.get()) is not None:
            yield each

    reading = asyncio.create_task(dispatch(child.stdout))
    child.stdin.write(f"{num_streams}\n".encode())
    result = await run([tokens(queue) for queue in queues])
    child.stdin.close()
    await child.wait()
    await reading
    return result


def child() -> None:
    """The engine's side of the pipes."""
    sys.stdout.write("up\n")
    sys.stdout.flush()
    num_streams = int(sys.stdin.readline())
    engine = Engine(backend())
    for number in range(num_streams):
        engine.add(request(number))
    while engine.has_work():
        rows = [(o.request_id, o.token_ids, o.finished) for o in engine.step()]
        if rows:
            sys.stdout.write(json.dumps(rows) + "\n")
            sys.stdout.flush()
    engine.close()


def report(name: str, num_streams: int, seconds: float, lags: Lags) -> None:
    """One row of the table."""
    lags.sort()
    step_ms = seconds / NUM_TOKENS * 1e3
    rate = num_streams * NUM_TOKENS / seconds
    p99 = lags[int(len(lags) * 0.99) - 1] * 1e3
    print(f"{name:10}{step_ms:10.2f}{rate:12,.0f}{mean(lags) * 1e3:12.2f}{p99:12.2f}")


def main(num_streams: int) -> None:
    """Three rounds of each, alternating."""
    print(f"{num_streams} streams, {NUM_TOKENS} tokens each, device {STEP_SECONDS * 1e3:.0f} ms")
    print(f"{'':10}{'step ms':>10}{'tok/s':>12}{'lag mean ms':>12}{'lag p99 ms':>12}")
    sides: list[tuple[str, Callable[[int], object]]] = [
        ("thread", on_a_thread),
        ("process", in_a_process),
    ]
    for _ in range(3):
        for name, side in sides:
            seconds, lags = asyncio.run(side(num_streams))  # type: ignore[arg-type]
            report(name, num_streams, seconds, lags)
    assert threading.active_count() == 1


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        child()
    else:
        parser = argparse.ArgumentParser(
            prog="python -m benchmarks.core.thread_or_process", description=__doc__
        )
        parser.add_argument("streams", type=int, nargs="?", default=256)
        main(parser.parse_args().streams)
