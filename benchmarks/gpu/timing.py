"""How long work takes on a device, launches left out, and what is said of a device."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch

_REPLAYS = 5
_TARGET = 0.02  # seconds of one timed run
L2_BYTES = 60 << 20


class Time(NamedTuple):
    """Seconds of one call.

    Attributes:
        seconds: The median.
        spread: Largest less smallest run, as a share of the median.
    """

    seconds: float
    spread: float


def measured(calls: Sequence[Callable[[], object]], device: torch.device, runs: int = 3) -> Time:
    """One call of several in turn, each with data of its own, so that no cache helps.

    On CUDA they are captured and replayed; elsewhere called once, which shows no more than that
    they run.
    """
    if device.type == "cuda":
        return _spread(_replayed(calls, device, runs), len(calls))
    start = time.perf_counter()
    for call in calls:
        call()
    return _spread([time.perf_counter() - start], len(calls))


def _spread(times: list[float], number: int) -> Time:
    middle = median(times)
    return Time(middle / number, (max(times) - min(times)) / middle)


def _replayed(
    calls: Sequence[Callable[[], object]], device: torch.device, runs: int
) -> list[float]:
    def all_calls() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        all_calls()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_calls()
    once = _timed(graph, 1)
    replays = max(_REPLAYS, min(200, int(_TARGET / max(once, 1e-7))))
    return [_timed(graph, replays) for _ in range(runs)]


def _timed(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / replays


def copies_for(num_bytes: int, device: torch.device) -> int:
    """Sets of data that no cache holds together."""
    if device.type != "cuda":
        return 1
    return max(1, min(64, -(-3 * L2_BYTES // max(num_bytes, 1))))


def device_name(device: torch.device) -> str:
    """As in names of files: "nvidia-h200"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "-".join(name.lower().replace("/", " ").split())


def queried(*fields: str) -> str:
    """What nvidia-smi says of the first GPU; empty where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
