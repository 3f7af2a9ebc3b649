"""The stopwatch divides the time of nested calls, and a profile of the embedded model adds up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import count

import pytest
from vllm_models.native.library import library

from benchmarks.cpu.engines import ROOT
from benchmarks.cpu.profile import Stopwatch, figures


def test_time_inside_a_call_is_not_counted_twice() -> None:
    ticks = count()
    stopwatch = Stopwatch(lambda: float(next(ticks)))
    kernel = stopwatch.wrap(lambda x: x, lambda args: f"kernel {args[0]}", lambda args: 8)
    outer = stopwatch.wrap(lambda: kernel(1) + kernel(2), "dispatch")
    assert outer() == 3
    # Six readings: 0 (1 2) (3 4) 5.
    assert {name: part.seconds for name, part in stopwatch.parts.items()} == {
        "kernel 1": 1,
        "kernel 2": 1,
        "dispatch": 3,
    }
    rows = {str(row["part"]): row for row in figures(stopwatch, 1, 5.0, 16.0)}
    assert rows["kernel 1"]["of read"] == "50%"
    assert rows["all kernels"]["of the step"] == "40.0%"
    assert rows["all else"]["us a step"] == 3e6


def test_a_call_that_raises_is_counted() -> None:
    stopwatch = Stopwatch()

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        stopwatch.wrap(fails, "part")()
    assert stopwatch.parts["part"].calls == 1


@pytest.mark.skipif(library() is None, reason="no native kernels here")
def test_a_profile_of_the_embedded_model_names_every_part() -> None:
    command = [sys.executable, "-m", "benchmarks.cpu", "profile", "--threads", "1", "--steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)% ", done.stdout, re.M)
    shares = {name: float(share) for name, _, _, share in rows}
    calls = {name: float(number) for name, number, _, _ in rows}
    assert {"dispatch", "scheduler", "sampling", "detokenization", "attention_bf16"} <= set(shares)
    assert calls["attention_bf16"] == 5
    assert calls["detokenization"] == 1
    assert shares["all kernels"] + shares["all else"] == pytest.approx(100, abs=0.2)
