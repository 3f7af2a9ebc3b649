"""`python -m benchmarks.gpu` with `kernels`, `engine`, `serving` or `report`."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, date, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "benchmarks" / "results"
SECONDS = 530  # of a command
NO_GPU = "There is no CUDA device here; --tiny runs every step of this command without one."


def arguments() -> argparse.ArgumentParser:
    """One command per part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, meaning in (
        ("kernels", "what the device can do, and every kernel as a share of it"),
        ("engine", "throughput and latency of the whole engine"),
        ("serving", "Poisson arrivals through the HTTP server, and a profile of decode steps"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("--seconds", type=float, default=SECONDS, help="for all stages")
        command.add_argument("--stages", help="names with commas between; all")
        command.add_argument("--results", type=Path, help="folder; that of the sources")
        command.add_argument(
            "--tiny",
            action="store_true",
            help="tiny shapes on the CPU, kernels in Triton's interpreter: shows that it runs",
        )
    written = commands.add_parser("report", help="write the tables of all runs anew")
    written.add_argument("--results", type=Path, default=_RESULTS)
    return parser


def main(words: list[str] | None = None) -> None:
    """Measure what was asked for."""
    parser = arguments()
    given = parser.parse_args(words)
    from benchmarks.gpu import table

    if given.what == "report":
        for path in table.write(given.results.glob("*-gpu-*.jsonl")):
            print(path)
        return
    given.results = given.results or (Path(mkdtemp()) if given.tiny else _RESULTS)
    if given.tiny:
        os.environ["VLLM_LITE_TRITON"] = "interpret"
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    if not given.tiny and not torch.cuda.is_available():
        parser.error(NO_GPU)
    try:
        path = run(given, torch.device("cpu" if given.tiny else "cuda:0"), words or sys.argv[1:])
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{', '.join(map(str, table.write([path])))}")


def run(given: argparse.Namespace, device: object, words: list[str]) -> Path:
    """All stages of a command; the file with their rows.

    Raises:
        ValueError: There is no such stage.
    """
    import torch

    from benchmarks.gpu import engine, kernels, serving
    from benchmarks.gpu.stages import Book, Clock
    from benchmarks.gpu.timing import device_name

    assert isinstance(device, torch.device)
    modules = {"kernels": kernels, "engine": engine, "serving": serving}
    stages = list(modules[given.what].stages(device, given.tiny))
    if given.stages:
        wanted = given.stages.split(",")
        known = [stage.name for stage in stages]
        if missing := sorted(set(wanted) - set(known)):
            raise ValueError(f"no stage is called {missing[0]!r}; there are {', '.join(known)}")
        stages = [stage for stage in stages if stage.name in wanted]
    path = given.results / f"{date.today()}-gpu-{device_name(device)}-{given.what}.jsonl"
    book = Book(path, about(device, ["python", "-m", "benchmarks.gpu", *words]))
    torch.manual_seed(0)
    book.run(stages, Clock(given.seconds))
    return path


def about(device: object, command: list[str]) -> dict[str, str]:
    """What is said of a run."""
    import torch

    from benchmarks.gpu.timing import queried

    assert isinstance(device, torch.device)
    is_cuda = device.type == "cuda"
    return {
        "run": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if is_cuda else "no GPU: tiny shapes",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "none",
        "driver": (queried("driver_version") if is_cuda else "") or "unknown",
        "python": platform.python_version(),
        "commit": _commit(),
        "command": shlex.join(command),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
