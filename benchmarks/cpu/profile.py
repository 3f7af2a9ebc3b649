"""Where a decode step goes: kernels by name, dispatch, scheduler, sampling, detokenization.

Every call is timed from outside, less the calls inside it, so the parts add up to the step. The
timers themselves, and in the table the walk through recorded calls, count as the part around them;
what the host really costs is measured by itself, with one timer around all recorded calls.
"""

from __future__ import annotations

import ctypes
import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from statistics import mean, median
from typing import Any, TypeVar
from unittest.mock import patch

from vllm_core import Engine, Scheduler
from vllm_models import load_backend
from vllm_models.components.decoder import Decoder
from vllm_models.native.attention import _Attention
from vllm_models.native.blocks import PackedBlocks
from vllm_models.native.dense import PackedDense
from vllm_models.native.experts import PackedExperts
from vllm_models.native.library import Function, Library
from vllm_models.native.tape import _Call
from vllm_models.runner.recorded import RecordedSteps
from vllm_models.runner.runner import Runner, Step
from vllm_server.config import EngineSettings, Settings
from vllm_server.launch import backend_options, find_model, scheduler_config
from vllm_server.text.detokenize import Detokenizer
from vllm_server.text.tokenizer import Tokenizer
from vllm_traits import Request, RequestOutput, SamplingParams

from benchmarks.cpu.ceilings import Meter
from benchmarks.cpu.rows import Figure, report, seconds
from benchmarks.cpu.runners.plan import Task, prompts_of

Held = TypeVar("Held")
NumBytes = Callable[[tuple[Any, ...]], int]


class Part:
    """What one name cost."""

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0  # less the calls inside
        self.bytes = 0  # read from memory, where that is known
        self.is_kernel = False


class Stopwatch:
    """Times functions that call each other, on one thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.parts: dict[str, Part] = {}
        self._clock = clock
        self._inside = [0.0]  # seconds of the calls within each call under way

    def wrap(
        self,
        function: Callable[..., Any],
        name: str | Callable[[tuple[Any, ...]], str],
        num_bytes: NumBytes | None = None,
        less: float = 0.0,
    ) -> Callable[..., Any]:
        """The same function, counted under a name; a kernel if its bytes are asked for.

        `less` seconds of each call are what it costs to call anything; they count as the part
        around it.
        """

        def timed(*args: Any, **named: Any) -> Any:
            began = self._clock()
            self._inside.append(0.0)
            try:
                return function(*args, **named)
            finally:
                spent = self._clock() - began - less
                within = self._inside.pop()
                self._inside[-1] += spent
                part = self.parts.setdefault(name if isinstance(name, str) else name(args), Part())
                part.calls += 1
                part.seconds += spent - within
                if num_bytes is not None:
                    part.is_kernel = True
                    part.bytes += num_bytes(args)

        return timed


class Weights:
    """The packed weights of this process by the address that kernels are given."""

    def __init__(self) -> None:
        packed = [*living(PackedDense), *living(PackedBlocks), *living(PackedExperts)]
        self._by_address = {place(held._arguments[0]): held for held in packed}

    def name(self, function: str, args: tuple[Any, ...]) -> str:
        """The function, and the shape of the weight."""
        held = self._by_address[place(args[0])]
        return f"{function} {held.outputs} x {held.columns}"

    def num_bytes(self, args: tuple[Any, ...]) -> int:
        """Of the weight, or of the experts that have rows."""
        held = self._by_address[place(args[0])]
        if not isinstance(held, PackedExperts):
            return held.nbytes
        count = held.num_experts
        starts = (ctypes.c_int64 * (count + 1)).from_address(args[len(held._arguments)])
        busy = sum(start < end for start, end in pairwise(starts))
        return held.nbytes * busy // count


def place(argument: Any) -> int:
    """The address of a structure, which may be given as a reference."""
    return argument if isinstance(argument, int) else ctypes.addressof(argument._obj)


def living(kind: type[Held]) -> list[Held]:
    """All objects of a class and its heirs; asking them for their class would warn."""
    return [held for held in gc.get_objects() if issubclass(type(held), kind)]


def attended_bytes(width: int, args: tuple[Any, ...]) -> int:
    """Keys and values of `width` bytes that a call of attention reads, as if without a window."""
    call = _Attention.from_address(place(args[0]))
    spans = (ctypes.c_int64 * (3 * args[2])).from_address(args[1])
    units = call.num_kv_heads * (call.key_dim + call.value_dim)
    return sum(spans[2::3]) * units * width


def watched(stopwatch: Stopwatch, library: Library) -> ExitStack:
    """Time everything until the stack is closed."""
    weights, stack = Weights(), ExitStack()
    replay, less = library.replay, call_seconds(library)
    recorded: dict[int, Callable[..., Any]] = {}  # by address
    keepers = _keepers()
    for name, function in list(vars(library).items()):
        if isinstance(function, Function) and name != "replay":
            counted = (*_labels(name, weights), less)
            timed = stopwatch.wrap(function, *counted)
            stack.enter_context(patch.object(library, name, timed))
            _stand_in(stack, keepers, function, timed)
            run = partial(_run_recorded, replay)
            recorded[function.address] = stopwatch.wrap(run, *counted)
    stack.enter_context(patch.object(library, "replay", partial(_replay, recorded)))
    for owner, method, name in _phases(type(living(Decoder)[0])):
        phase = stopwatch.wrap(getattr(owner, method), name)
        stack.enter_context(patch.object(owner, method, phase))
    return stack


def _keepers() -> list[tuple[object, str]]:
    """Weights that keep the function they call, and what they call it."""
    linear = [(held, "_linear") for held in (*living(PackedDense), *living(PackedBlocks))]
    return [*linear, *((held, "_function") for held in living(PackedExperts))]


def _stand_in(
    stack: ExitStack,
    keepers: list[tuple[object, str]],
    function: Function,
    timed: Callable[..., Any],
) -> None:
    for held, kept in keepers:
        if getattr(held, kept) is function:
            stack.enter_context(patch.object(held, kept, timed))


def call_seconds(library: Library) -> float:
    """What a call of a function that does nothing costs."""
    return seconds(lambda: [library.replay(0, 0) for _ in range(1000)]) / 1000


def _run_recorded(replay: Callable[[int, int], int], *_: int, at: int) -> int:
    return replay(at, 1)


def _replay(recorded: Mapping[int, Callable[..., Any]], address: int, count: int) -> int:
    """Recorded calls one by one."""
    calls = (_Call * count).from_address(address)
    size = ctypes.sizeof(_Call)
    return sum(
        recorded[call.run](*call.arguments, at=address + index * size)
        for index, call in enumerate(calls)
    )


def _labels(name: str, weights: Weights) -> tuple[str | Callable[..., str], NumBytes]:
    """What calls of a kernel are called, and how much they read."""
    if name.endswith(("_linear", "_experts")):
        return partial(weights.name, name), weights.num_bytes
    if name.startswith("attention"):
        return name, partial(attended_bytes, 2 if name.endswith("bf16") else 4)
    return name, _no_bytes


def _phases(model: type[Decoder]) -> Iterator[tuple[type, str, str]]:
    """Methods, and what their own time is called."""
    yield Engine, "step", "engine loop"
    for method in ("schedule", "update", "take_outputs"):
        yield Scheduler, method, "scheduler"
    yield Runner, "forward", "inputs of the step"
    yield RecordedSteps, "forward", "dispatch"
    yield model, "forward", "dispatch"
    yield model, "logits", "dispatch"
    yield Step, "make_tokens", "sampling"
    yield Detokenizer, "feed", "detokenization"


def _no_bytes(_: tuple[Any, ...]) -> int:
    return 0


class Decoding:
    """Requests that decode, and their text."""

    def __init__(self, given: Namespace) -> None:
        settings = EngineSettings(
            model=given.model,
            device="cpu",
            num_threads=given.threads,
            kv_cache_memory=4 << 30,
            max_num_seqs=given.batch,
            isq=given.isq,
        )
        path = find_model(settings)
        backend = load_backend(backend_options(settings, path))
        self._engine = Engine(backend, scheduler_config(Settings(engine=settings)))
        self._texts: dict[str, Detokenizer] = {}
        task = Task("profile", given.batch, given.context, given.steps)
        params = SamplingParams(temperature=0.0, max_tokens=1 << 20, ignore_eos=True)
        tokenizer = Tokenizer(path)
        for place, prompt in enumerate(prompts_of(task, backend.info.vocab_size)):
            self._engine.add(Request(str(place), tuple(prompt), params))
            self._texts[str(place)] = tokenizer.detokenizer()
        begun: set[str] = set()
        while len(begun) < given.batch:
            begun |= {made.request_id for made in self.step() if made.token_ids}

    def step(self) -> list[RequestOutput]:
        """One step of the engine, its tokens turned into text."""
        outputs = self._engine.step()
        for made in outputs:
            self._texts[made.request_id].feed(made.token_ids)
        return outputs


def figures(stopwatch: Stopwatch, steps: int, elapsed: float, read: float) -> Iterator[Figure]:
    """One row per part, the longest first, then kernels and all else together."""
    ordered = sorted(stopwatch.parts.items(), key=lambda entry: -entry[1].seconds)
    for name, part in ordered:
        yield _row(name, part, steps, elapsed, read)
    kernels, host = Part(), Part()
    for _, part in ordered:
        if part.is_kernel:
            kernels.calls += part.calls
            kernels.seconds += part.seconds
            kernels.bytes += part.bytes
    host.seconds = elapsed - kernels.seconds
    yield _row("all kernels", kernels, steps, elapsed, read)
    yield _row("all else", host, steps, elapsed, read)


def _row(name: str, part: Part, steps: int, elapsed: float, read: float) -> Figure:
    rate = part.bytes / part.seconds if part.seconds else 0.0
    return {
        "part": name,
        "calls a step": part.calls / steps,
        "us a step": part.seconds / steps * 1e6,
        "of the step": f"{part.seconds / elapsed:.1%}",
        "GB/s": rate / 1e9 if rate else "",
        "of read": f"{rate / read:.0%}" if rate else "",
    }


def timed_steps(decoding: Decoding, steps: int) -> float:
    """Seconds of so many steps."""
    began = time.perf_counter()
    for _ in range(steps):
        decoding.step()
    return time.perf_counter() - began


def outside_kernels(decoding: Decoding, library: Library, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and of what each spends outside of C; recorded calls are one."""
    stopwatch, keepers, inside = Stopwatch(), _keepers(), "inside"
    walls: list[float] = []
    hosts: list[float] = []
    with ExitStack() as stack:
        for name, function in list(vars(library).items()):
            if isinstance(function, Function):
                timed = stopwatch.wrap(function, inside)
                stack.enter_context(patch.object(library, name, timed))
                _stand_in(stack, keepers, function, timed)
        for _ in range(steps):
            stopwatch.parts.clear()
            walls.append(timed_steps(decoding, 1))
            hosts.append(walls[-1] - stopwatch.parts[inside].seconds)
    return median(walls), median(hosts)


def main(given: Namespace, library: Library) -> None:
    """Profile decode steps of a model and print where they go."""
    decoding, meter = Decoding(given), Meter(library)
    stopwatch, before = Stopwatch(), meter.read()
    wall, host = outside_kernels(decoding, library, given.steps)
    with watched(stopwatch, library):
        elapsed = timed_steps(decoding, given.steps)
    read = mean((before, meter.read()))
    report(figures(stopwatch, given.steps, elapsed, read), None)
    print(
        f"\n{wall * 1e3:.3f} ms a step, {host * 1e3:.3f} ms of it outside kernels (medians); "
        f"{given.batch} sequences, {given.threads} threads, {read / 1e9:.1f} GB/s read"
    )
