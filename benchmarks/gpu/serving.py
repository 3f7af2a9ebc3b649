"""A server under Poisson arrivals, and where the time of decode steps goes.

The server runs from the installed packages with a random checkpoint of Qwen3-0.6B on the disk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import torch
from torch.profiler import ProfilerActivity, profile
from vllm_core import Engine
from vllm_core.config import SchedulerConfig

from benchmarks.cpu.rows import Figure
from benchmarks.cpu.shapes import SMALL, TINY, Shape, model_path
from benchmarks.gpu.models import load
from benchmarks.gpu.requests import long_outputs, within
from benchmarks.gpu.running import Running
from benchmarks.gpu.stages import Clock, Stage

_PACKAGES = ("vllm_server", "starlette", "uvicorn", "msgspec", "tokenizers")
_PROGRAM = (sys.executable, "-c", "import sys; from vllm_server.cli import main; sys.exit(main())")
_SHARES = (0.5, 0.8)  # of the measured capacity
_POLL = 0.2  # seconds


class Load(NamedTuple):
    """What clients ask of the server.

    Attributes:
        shape: Of the model.
        requests: To measure the capacity, all at once.
        seconds: Of Poisson arrivals.
        prompt: Tokens of each.
        output: Tokens of each.
        profiled: Batch sizes of the profile.
        steps: That are profiled.
        dataset: Of the clients: random has token ids that a small vocabulary lacks.
    """

    shape: Shape
    requests: int
    seconds: float
    prompt: int
    output: int
    profiled: tuple[int, ...]
    steps: int
    dataset: str = "random"


FULL = Load(SMALL, 512, 60, 512, 256, (1, 256), 20)
SHORT = Load(TINY, 2, 0.5, 4, 3, (2,), 2, "fixed")


def stages(device: torch.device, is_tiny: bool) -> Iterator[Stage]:
    """The server, then a profile of each batch size."""
    load_of = SHORT if is_tiny else FULL
    yield Stage("HTTP serving", 330, partial(_serving, load_of, device))
    for batch in load_of.profiled:
        yield Stage(f"profile of {batch}", 60, partial(_profile, load_of, batch, device))


def missing() -> list[str]:
    """Packages that the server needs and that are not here."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def _serving(load_of: Load, device: torch.device, clock: Clock) -> Iterator[Figure]:
    if absent := missing():
        yield {"skipped": f"these packages are not installed: {', '.join(absent)}"}
        return
    with tempfile.TemporaryDirectory() as folder:
        model = model_path(Path(folder), load_of.shape, "bf16")
        with _server(model, device, load_of, clock) as url:
            yield from _rates(load_of, url, Path(folder), clock)


def _rates(load_of: Load, url: str, folder: Path, clock: Clock) -> Iterator[Figure]:
    """All at once for the capacity, then Poisson arrivals at shares of it."""
    _asked(load_of, url, folder, load_of.requests, None, clock)
    whole = _asked(load_of, url, folder, load_of.requests, None, clock)
    capacity = load_of.requests / whole["seconds"]
    yield _row("all at once", whole, None)
    for share in _SHARES:
        rate = share * capacity
        count = max(2, int(rate * load_of.seconds))
        found = _asked(load_of, url, folder, count, rate, clock)
        yield _row(f"{share:.0%} of capacity", found, rate)


def _row(arrivals: str, found: dict[str, Any], rate: float | None) -> Figure:
    """Latencies in milliseconds; outputs/s beside what the clients offered."""
    row: Figure = {
        "arrivals": arrivals,
        "requests/s": found["completed"] / found["seconds"],
        "offered/s": "" if rate is None else rate,
        "failed": found["failed"],
        "output tokens/s": found["output_tokens_per_second"],
    }
    for name in ("ttft_ms", "itl_ms"):
        spread = found[name]
        row |= {f"{name[:-3]} {point} ms": spread[point] for point in ("median", "p99")}
    return row


def _asked(
    load_of: Load, url: str, folder: Path, count: int, rate: float | None, clock: Clock
) -> dict[str, Any]:
    """What the clients saw.

    Raises:
        RuntimeError: The clients failed.
        TimeoutError: Time is up.
    """
    path = folder / "clients.json"
    command = [*_PROGRAM, "bench", "serve", "--url", url]
    command += ["--num-prompts", str(count), "--input-len", str(load_of.prompt)]
    command += ["--output-len", str(load_of.output), "--temperature", "1"]
    command += ["--output-json", str(path), "--dataset", load_of.dataset]
    command += ["--request-rate", str(rate)] if rate is not None else []
    clock.check()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=clock.left, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError("the clients took too long") from None
    if done.returncode != 0:
        raise RuntimeError(
            f"the clients ended with {done.returncode}: {(done.stdout + done.stderr)[-400:]}"
        )
    return json.loads(path.read_text())


@contextmanager
def _server(model: Path, device: torch.device, load_of: Load, clock: Clock) -> Iterator[str]:
    """A server that is ready; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    room = 256 + 2 * (load_of.prompt + load_of.output)
    longest = min(room, load_of.shape["max_position_embeddings"])
    command = [*_PROGRAM, "serve", "--model", str(model)]
    command += ["--port", str(port), "--device", str(device), "--max-model-len", str(longest)]
    command += ["--max-num-queued-reqs", str(4 * load_of.requests)]
    url = f"http://127.0.0.1:{port}"
    log = model.parent / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=_environment())
        try:
            _await_ready(server, url, log, clock)
            yield url
        finally:
            server.terminate()
            server.wait(30)


def _environment() -> dict[str, str]:
    """This process's own, without what makes kernels run in the interpreter."""
    return {name: value for name, value in os.environ.items() if "TRITON" not in name}


def _await_ready(server: subprocess.Popen[bytes], url: str, log: Path, clock: Clock) -> None:
    while True:
        clock.check()
        if server.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text()[-400:]}")
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(_POLL)


def _profile(load_of: Load, batch: int, device: torch.device, clock: Clock) -> Iterator[Figure]:
    """Kernels of some decode steps, most time first, and the share of the time without any."""
    is_cuda = device.type == "cuda"
    room = load_of.prompt + load_of.steps + 64
    options = {} if is_cuda else {"num_blocks": 64}
    block_size = 64 if is_cuda else 16
    backend = load(
        load_of.shape,
        "bf16",
        device,
        **{"block_size": block_size, "max_sequences": batch, "max_model_len": room, **options},
    )
    work = within(long_outputs(batch, load_of.prompt, room), load_of.shape["vocab_size"])
    work = work._replace(outputs=(room - load_of.prompt - 1,) * batch)
    kinds = [ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]
    engine = Engine(backend, SchedulerConfig(prefix_cache=False))
    with Running(engine, work, clock) as running:
        running.begin()
        running.go_on(2)
        with profile(activities=kinds) as profiled:
            times = running.go_on(load_of.steps)
            if is_cuda:
                torch.cuda.synchronize(device)
    yield from profile_rows(_spans(profiled, is_cuda), times.seconds, len(times.steps))
    engine.close()


class Span(NamedTuple):
    """All calls of one kernel: microseconds together, and how many."""

    name: str
    us: float
    calls: int


def _spans(profiled: profile, is_cuda: bool) -> list[Span]:
    """By kernel."""
    found = profiled.key_averages()
    times = [
        Span(e.key, e.self_device_time_total if is_cuda else e.self_cpu_time_total, e.count)
        for e in found
    ]
    return [span for span in times if span.us > 0]


def profile_rows(
    spans: Sequence[Span], seconds: float, steps: int, most: int = 20
) -> Iterator[Figure]:
    """The summary, then the kernels that take most.

    Args:
        spans: Of all steps.
        seconds: That the steps took.
        steps: How many.
        most: Rows.
    """
    busy = sum(span.us for span in spans) / 1e6
    yield {
        "ms/step": seconds / steps * 1e3,
        "kernels/step": sum(span.calls for span in spans) / steps,
        "share in kernels": busy / seconds,
        "share of gaps": 1 - busy / seconds,
    }
    for span in sorted(spans, key=lambda span: -span.us)[:most]:
        yield {
            "kernel": span.name[:80],
            "us/step": span.us / steps,
            "calls/step": span.calls / steps,
            "share": span.us / 1e6 / seconds,
        }
