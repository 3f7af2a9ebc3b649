"""Ours and the peers that are installed, in turn, on the same random checkpoints.

Rounds go over all models, and over all engines of each (A B A B), every one in a process of its
own, with the ceilings measured just before. Rows are written as they come, the table after each
process, so that nothing is lost when a long run is stopped. The table has the newest run of each
case that the day's file holds.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cpu.cases import Case, chosen, grouped
from benchmarks.cpu.engines import ROOT, Engine, environment, installed, plan_for, run
from benchmarks.cpu.limits import Rates, Work, work_of
from benchmarks.cpu.shapes import gguf_path, model_path
from benchmarks.cpu.table import Row, is_quiet, latest, markdown

RESULTS = ROOT / "benchmarks" / "results"


class Moment(NamedTuple):
    """The machine just before a model's turn."""

    rates: Rates
    busy: float  # cores that others keep busy


class Comparison:
    """One run of the command.

    Args:
        given: Its arguments.
    """

    def __init__(self, given: Namespace) -> None:
        wanted = given.engines.split(",") if given.engines else None
        self._engines = [
            engine for engine in installed(given.peers) if not wanted or engine.name in wanted
        ]
        if wanted and len(self._engines) != len(wanted):
            names = ", ".join(engine.name for engine in installed(given.peers))
            raise ValueError(f"of the engines {given.engines}, these are installed: {names}")
        self._cache: Path = given.cache
        self._threads: int = given.threads
        self._rounds: int = given.rounds
        self._recorded = recorded_reads(given.results)
        self._about = {
            "run": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "date": date.today().isoformat(),
            "machine": machine(),
            "threads": given.threads,
            "command": shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]]),
        }
        given.results.mkdir(parents=True, exist_ok=True)
        self._path: Path = given.results / f"{self._about['date']}-cpu-compare.jsonl"

    def run(self, cases: list[Case]) -> None:
        """All rounds."""
        self._keep({"about": self._about})
        for turn in range(self._rounds):
            for group in grouped(cases):
                self._run_group(turn, group)
        print(f"\n{self._path.with_suffix('.md')}")

    def _run_group(self, turn: int, group: list[Case]) -> None:
        model = model_path(self._cache, group[0].shape, group[0].weights)
        work = work_of(group[0].shape, model)
        warm(model)
        moment = Moment(measured_rates(self._threads), busy_cores())
        for engine in self._engines:
            served = [case for case in group if engine.serves(case)]
            if not served:
                continue
            path = self._path_for(engine, model)
            try:
                lines = run(engine, plan_for(path, served, self._threads))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"no figures: {error}", file=sys.stderr, flush=True)
                continue
            for case, line in zip(served, lines, strict=True):
                self._add({"round": turn, "model": model.name, **line}, case, work, moment)
            self._write_table()

    def _write_table(self) -> None:
        """Of the whole file, so that a day's cases may be measured by several commands."""
        rows, runs = latest(map(json.loads, self._path.read_text().splitlines()))
        if rows:
            self._path.with_suffix(".md").write_text(markdown(rows, runs))

    def _path_for(self, engine: Engine, model: Path) -> Path:
        """llama.cpp reads GGUF files alone."""
        if engine.name != "llama.cpp" or not model.is_dir():
            return model
        path = gguf_path(model, "bf16")
        warm(path)
        return path

    def _add(self, row: Row, case: Case, work: Work, moment: Moment) -> None:
        decode, prefill = row["decode_tokens_per_s"], row["prefill_tokens_per_s"]
        rates, busy = moment
        row |= {**rates._asdict(), "busy_cores": busy, "run": self._about["run"]}
        row["quiet"] = is_quiet(rates.read, self._recorded, busy)
        row["decode_of_limit"] = decode and decode / work.decode(case.task, rates)
        row["prefill_of_limit"] = prefill / work.prefill(rates)
        self._keep(row)
        shown = f"{decode:.1f} tokens/s" if decode else "no decoding"
        print(
            f"round {row['round']} {case.name} {row['engine']}: {shown}, prompts at "
            f"{prefill:.0f} tokens/s, ready in {row['ready_s']:.1f} s",
            flush=True,
        )

    def _keep(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def recorded_reads(results: Path) -> list[float]:
    """Read rates of earlier runs."""
    lines = [
        json.loads(line)
        for path in results.glob("*-cpu-compare.jsonl")
        for line in path.read_text().splitlines()
    ]
    return [line["read"] for line in lines if "read" in line]


def measured_rates(threads: int) -> Rates:
    """The ceilings of this moment, measured in a process that ends with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ceilings.jsonl"
        command = [sys.executable, "-m", "benchmarks.cpu", "ceilings", "--threads", str(threads)]
        subprocess.run(
            [*command, "--json", str(path)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        rows = map(json.loads, path.read_text().splitlines())
        rates = {row["ceiling"]: row["rate"] * 1e9 for row in rows}
    return Rates(rates["read"], rates["bf16 products"])


def busy_cores(over: float = 1.0) -> float:
    """Cores in use while this process waits; 0 where the system does not say."""
    source = Path("/proc/stat")
    if not source.is_file():
        return 0.0

    def idle() -> int:
        """Ticks of all cores, waiting for files included."""
        fields = source.read_text().splitlines()[0].split()
        return int(fields[4]) + int(fields[5])

    before, began = idle(), time.monotonic()
    time.sleep(over)
    ticks = (time.monotonic() - began) * os.sysconf("SC_CLK_TCK")
    return max(0.0, (os.cpu_count() or 1) - (idle() - before) / ticks)


def warm(model: Path) -> None:
    """Read the model's files once, so that they are in memory for every engine."""
    for path in model.iterdir() if model.is_dir() else [model]:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def machine() -> str:
    """Processor, cores, memory, system."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()}, CPython {platform.python_version()}"
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB; {system}"


def main(given: Namespace) -> None:
    """Run the comparison.

    Raises:
        ValueError: There is no such case or engine.
    """
    Comparison(given).run(chosen(given.cases))
