"""What the host costs per step: `python -m benchmarks.core`.

Times are of the scheduler alone; what a backend would do is left out. Each figure is the median
and the best of several rounds, because the machine is rarely quiet.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

from vllm_core import Scheduler, SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.kv_cache.keys import KeyChain
from vllm_traits import BackendInfo, Batch, BatchOutput, Request, SamplingParams

BLOCK_SIZE = 16


class Figure(NamedTuple):
    """One row of the table, in milliseconds; the goal is a limit."""

    name: str
    median_ms: float
    best_ms: float
    goal_ms: float | None


def answer(batch: Batch, token: int = 7) -> BatchOutput:
    """One token for every chunk that samples."""
    return BatchOutput({chunk.seq_id: (token,) for chunk in batch.chunks if chunk.sample})


def scheduler_of(num_sequences: int, num_blocks: int) -> Scheduler:
    """A scheduler with room for so many sequences, overlap on."""
    info = BackendInfo(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=40_000,
        vocab_size=32_000,
        eos_token_ids=frozenset({0}),
        max_sequences=num_sequences,
        max_batch_tokens=1 << 20,
    )
    return Scheduler(info, config=SchedulerConfig(max_waiting=num_sequences))


def decodes(num_sequences: int, num_steps: int = 200) -> Figure:
    """Schedule and update of steady decodes with two batches in flight."""
    scheduler = scheduler_of(num_sequences, num_sequences * 40)
    for number in range(num_sequences):
        prompt = tuple(range(1, 33 + number % BLOCK_SIZE))
        params = SamplingParams(max_tokens=30_000, seed=number)
        scheduler.add(Request(str(number), prompt, params, salt=str(number).encode()))
    previous = scheduler.schedule()
    assert previous is not None
    times: list[float] = []
    for _ in range(num_steps):
        output = answer(previous)
        began = time.perf_counter()
        batch = scheduler.schedule()
        scheduler.update(output)
        scheduler.take_outputs()
        times.append(time.perf_counter() - began)
        assert batch is not None and len(batch.chunks) == num_sequences
        previous = batch
    goal = {256: 1.0, 2048: 8.0}.get(num_sequences)
    name = f"schedule + update, {num_sequences:,} decodes, overlap"
    return Figure(name, median(times[2:]) * 1e3, min(times[2:]) * 1e3, goal)


def repeated(name: str, goal_ms: float | None, rounds: int, call: Callable[[], float]) -> Figure:
    """A figure of something that is called once per round and returns seconds."""
    times = [call() for _ in range(rounds)]
    return Figure(name, median(times) * 1e3, min(times) * 1e3, goal_ms)


def prefix_match(num_tokens: int = 32_768) -> Figure:
    """Keys, lookup and verification of a long prompt that is present in full."""
    num_blocks = num_tokens // BLOCK_SIZE
    info = BackendInfo(num_blocks, BLOCK_SIZE, num_tokens + 1, 32_000)
    cache = KVCache(info)
    token_ids = [(place * 31) % 30_000 for place in range(num_tokens)]
    table = cache.table(b"", None, reuses=True)
    cache.grow(table, num_tokens)
    cache.publish(table, token_ids, num_tokens)
    cache.release(table)

    def once() -> float:
        again = cache.table(b"", None, reuses=True)
        began = time.perf_counter()
        held = cache.attach(again, token_ids, 0)
        seconds = time.perf_counter() - began
        assert held == num_tokens - BLOCK_SIZE
        cache.release(again)
        return seconds

    return repeated(f"prefix match, {num_tokens:,} tokens", 3.0, 15, once)


def keys_alone(num_tokens: int = 32_768) -> Figure:
    """The part of a match that is SHA-256 over packed tokens."""
    token_ids = [(place * 31) % 30_000 for place in range(num_tokens)]
    root = KVCache(BackendInfo(1, BLOCK_SIZE, 1, 1)).table(b"", None, reuses=True).chain.root

    def once() -> float:
        began = time.perf_counter()
        KeyChain(root, BLOCK_SIZE).extend(token_ids, num_tokens // BLOCK_SIZE)
        return time.perf_counter() - began

    return repeated("  of which keys", None, 15, once)


def after_finished(scheduler: Scheduler, num_finished: int, so_far: int) -> Figure:
    """One step of 32 decodes when so many requests have come and gone."""
    for number in range(so_far, num_finished):
        run_short_request(scheduler, str(number))
    for number in range(32):
        scheduler.add(Request(f"r{number}", (1, 2, 3), SamplingParams(max_tokens=220)))
    times: list[float] = []
    output: BatchOutput | None = None
    while scheduler.has_work():
        began = time.perf_counter()
        batch = scheduler.schedule()
        if output is not None:
            scheduler.update(output)
        scheduler.take_outputs()
        times.append(time.perf_counter() - began)
        output = None if batch is None else answer(batch)
    name = f"schedule + update, 32 decodes, after {num_finished:,} finished"
    return Figure(name, median(times) * 1e3, min(times) * 1e3, None)


def run_short_request(scheduler: Scheduler, name: str) -> None:
    """A request of one token."""
    scheduler.add(Request(name, (5, 6, 7, int(name[-1])), SamplingParams(max_tokens=1)))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.update(answer(batch))
    scheduler.take_outputs()


def finished_requests() -> list[Figure]:
    """The same step at three ages of an engine."""
    scheduler = scheduler_of(64, 4096)
    figures: list[Figure] = []
    so_far = 0
    for num_finished in (10, 10_000, 100_000):
        figures.append(after_finished(scheduler, num_finished, so_far))
        so_far = num_finished
    return figures


def main() -> int:
    """Print the table; the exit code says whether every goal was reached by the median."""
    print(f"{platform.python_implementation()} {platform.python_version()}, {platform.machine()}")
    print(f"{'':58}{'median ms':>10}{'best ms':>10}{'goal ms':>10}")
    missed = 0
    figures = [decodes(256), decodes(2048, 60), prefix_match(), keys_alone(), *finished_requests()]
    for figure in figures:
        goal = "" if figure.goal_ms is None else f"{figure.goal_ms:.1f}"
        print(f"{figure.name:58}{figure.median_ms:10.3f}{figure.best_ms:10.3f}{goal:>10}")
        missed += figure.goal_ms is not None and figure.median_ms > figure.goal_ms
    return 1 if missed else 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__).parse_args()
    sys.exit(main())
