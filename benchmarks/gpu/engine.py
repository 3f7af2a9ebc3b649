"""The whole engine without HTTP: throughput, and decode steps of a steady batch, against the
roofline of the same run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from vllm_core import Engine
from vllm_core.config import SchedulerConfig

from benchmarks.cpu.rows import Figure
from benchmarks.cpu.shapes import SMALL, TINY, Shape
from benchmarks.gpu.ceilings import SHORT, Meter
from benchmarks.gpu.ceilings import TINY as TINY_EXTENT
from benchmarks.gpu.models import EXPERTS30, LLAMA8, TINY_EXPERTS, load
from benchmarks.gpu.requests import Workload, long_outputs, nano, within
from benchmarks.gpu.roofline import Ceilings, Size, run_seconds, step_seconds
from benchmarks.gpu.running import Running
from benchmarks.gpu.stages import Clock, Stage

_WARM = 64  # requests


class Steady(NamedTuple):
    """A batch that decodes, each sequence around the same context.

    Attributes:
        batch: Sequences.
        context: Tokens of each in the middle of the run.
        steps: That are timed.
    """

    batch: int
    context: int
    steps: int


class Setup(NamedTuple):
    """A model, how it is loaded, and what it does.

    Attributes:
        name: Of the stage.
        seconds: It may take.
        shape: Of the model.
        weights: bf16, fp8 or w4.
        works: In this order.
        options: Of the backend.
        overlap: Of the scheduler.
        runs: Of every throughput run.
    """

    name: str
    seconds: float
    shape: Shape
    weights: str
    works: tuple[Workload | Steady, ...]
    options: Mapping[str, Any] = {}
    overlap: bool = True
    runs: int = 3

    @property
    def max_sequences(self) -> int:
        """Rows that are enough."""
        return max(w.batch if isinstance(w, Steady) else len(w.outputs) for w in self.works)

    @property
    def max_model_len(self) -> int:
        """Of the longest sequence, with room for those that begin early."""
        lengths = [
            w.context + w.steps + 2 if isinstance(w, Steady) else w.longest for w in self.works
        ]
        return max(lengths) + 128


def setups(is_tiny: bool) -> tuple[Setup, ...]:
    """What is measured, in order of what is most wanted."""
    if is_tiny:
        works = (within(nano(4, 3, 6), 400), Steady(2, 8, 3))
        few = (Steady(2, 8, 2),)
        return (
            Setup("tiny", 60, TINY, "bf16", works, {}, True, 1),
            Setup("tiny, fp8 KV", 60, TINY, "bf16", few, {"kv_cache_dtype": "fp8"}),
            Setup("tiny, fp8 weights", 60, TINY, "fp8", few),
            Setup("tiny, w4", 60, TINY, "w4", few, {"enforce_eager": True}, False),
            Setup("tiny experts", 60, TINY_EXPERTS, "bf16", few),
        )
    bench, long = nano(), long_outputs()
    one, llama = Steady(1, 256, 256), tuple(Steady(b, 1024, 128) for b in (1, 32, 256))
    experts = tuple(Steady(b, 1024, 128) for b in (1, 64, 256))
    fp8_kv = {"kv_cache_dtype": "fp8"}
    return (
        Setup("0.6B", 100, SMALL, "bf16", (bench, long, one)),
        Setup("0.6B, fp8 KV", 50, SMALL, "bf16", (bench, long), fp8_kv, True, 2),
        Setup("0.6B, no overlap", 30, SMALL, "bf16", (bench, one), {}, False, 1),
        Setup("0.6B, eager", 45, SMALL, "bf16", (one, bench), {"enforce_eager": True}, True, 1),
        Setup("8B", 50, LLAMA8, "bf16", llama),
        Setup("8B, fp8", 45, LLAMA8, "fp8", llama),
        Setup("8B, w4", 45, LLAMA8, "w4", llama[:2]),
        Setup("30B-A3B", 80, EXPERTS30, "bf16", experts),
        Setup("0.6B, deterministic", 30, SMALL, "bf16", (bench,), {"deterministic": True}, True, 1),
    )


def stages(device: torch.device, is_tiny: bool) -> Iterator[Stage]:
    """Ceilings, every setup, ceilings again."""
    meter = Meter(device, TINY_EXTENT if is_tiny else SHORT)
    yield Stage("ceilings", 25, lambda _: meter.figures())
    for setup in setups(is_tiny):
        yield Stage(setup.name, setup.seconds, partial(measure, setup, device, meter))
    yield Stage("ceilings at the end", 20, lambda _: meter.figures())


def measure(setup: Setup, device: torch.device, meter: Meter, clock: Clock) -> Iterator[Figure]:
    began = time.perf_counter()
    block_size = 64 if device.type == "cuda" else 16
    backend = load(
        setup.shape,
        setup.weights,
        device,
        **{
            "block_size": block_size,
            "max_sequences": setup.max_sequences,
            "max_model_len": setup.max_model_len,
            "max_batch_tokens": 16384 if device.type == "cuda" else 64,
            **({} if device.type == "cuda" else {"num_blocks": 64}),
            **setup.options,
        },
    )
    memory = backend.memory
    yield {
        "loaded in s": time.perf_counter() - began,
        "weights GB": memory.weight_bytes / 1e9,
        "KV GB": memory.num_blocks * memory.bytes_per_block / 1e9,
        "peak GB": _peak(device),
    }
    engine = Engine(backend, SchedulerConfig(overlap=setup.overlap, prefix_cache=False))
    try:
        for work in setup.works:
            if isinstance(work, Steady):
                yield _steady(setup, work, engine, meter.ceilings, clock)
            else:
                yield from _throughput(setup, work, engine, meter.ceilings, clock)
    finally:
        engine.close()
        del engine, backend
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _peak(device: torch.device) -> float:
    return torch.cuda.max_memory_reserved(device) / 1e9 if device.type == "cuda" else 0.0


def _throughput(
    setup: Setup, work: Workload, engine: Engine, ceilings: Ceilings, clock: Clock
) -> Iterator[Figure]:
    prompts = [len(prompt) for prompt in work.prompts]
    size, is_8_bit = Size.of(setup.shape.fields), "kv_cache_dtype" in setup.options
    limit = run_seconds(size, prompts, work.outputs, ceilings, is_8_bit)
    warm = work.first(min(_WARM, len(prompts)), "warm")
    warm = warm._replace(outputs=tuple(min(32, output) for output in warm.outputs))
    with Running(engine, warm, clock) as running:
        running.go_on()
    rates: list[float] = []
    for _ in range(setup.runs):
        with Running(engine, work, clock) as running:
            prompt_times, rest = running.begin(), running.go_on()
        tokens = prompt_times.tokens + rest.tokens
        rates.append(tokens / (prompt_times.seconds + rest.seconds))
    yield {
        "work": work.name,
        "tokens": tokens,
        "s": work.num_output_tokens / median(rates),
        "tokens/s": median(rates),
        "spread": (max(rates) - min(rates)) / median(rates),
        "of limit": median(rates) * limit / work.num_output_tokens,
        "prompts s": prompt_times.seconds,
        **_step_times(rest.steps),
    }


def _step_times(steps: list[float]) -> Figure:
    """Of calls of the engine, in milliseconds."""
    ordered = sorted(steps)
    far = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"step p50 ms": median(ordered) * 1e3, "step p99 ms": far * 1e3}


def _steady(setup: Setup, work: Steady, engine: Engine, ceilings: Ceilings, clock: Clock) -> Figure:
    size, is_8_bit = Size.of(setup.shape.fields), "kv_cache_dtype" in setup.options
    prompt = max(1, work.context - work.steps // 2)
    ids = within(long_outputs(work.batch, prompt, work.steps), setup.shape["vocab_size"])
    short, room = work.batch * (2,), engine.backend.info.max_model_len - prompt - 1
    with Running(engine, ids._replace(outputs=short), clock) as running:
        running.go_on()
    # The first to begin go on while others still read their prompts.
    long = ids._replace(outputs=work.batch * (room,))
    with Running(engine, long, clock) as running:
        prompts, times = running.begin(), running.go_on(work.steps)
    ideal = step_seconds(size, setup.weights, [work.context] * work.batch, ceilings, is_8_bit)
    each = times.seconds / len(times.steps)
    return {
        "batch": work.batch,
        "context": work.context,
        "ms/step": each * 1e3,
        "tokens/s": times.tokens / times.seconds,
        "of limit": ideal / each,
        "prompts s": prompts.seconds,
        **_step_times(times.steps),
    }
