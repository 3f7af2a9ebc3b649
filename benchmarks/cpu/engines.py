"""Which engines are here, and one process of one of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cpu.cases import Case
from benchmarks.cpu.runners.plan import Plan

ROOT = Path(__file__).parents[2]
_ROOM = 64  # tokens beyond the longest sequence, since not all sequences start at once
_LIMIT = 3600  # seconds for one process


class Engine(NamedTuple):
    """One way to run a model.

    Attributes:
        name: In tables.
        python: Of its environment.
        module: Its runner.
        serves: Whether it can run a case.
    """

    name: str
    python: Path
    module: str
    serves: Callable[[Case], bool]


def _always(_: Case) -> bool:
    return True


def _is_dense_bf16(case: Case) -> bool:
    return case.weights == "bf16" and "num_experts" not in case.shape.fields


def installed(peers: Path) -> list[Engine]:
    """Ours first, then the peers whose environments are there."""
    found = [Engine("vllm-lite", Path(sys.executable), "ours", _always)]
    for name, folder, module, serves in (
        ("llama.cpp", "llama-cpp", "llama_cpp_runner", _always),
        ("vLLM", "vllm", "vllm_runner", _is_dense_bf16),
    ):
        python = (peers / folder / "bin" / "python").absolute()
        if python.exists():
            found.append(Engine(name, python, module, serves))
    if importlib.util.find_spec("transformers"):
        python = Path(sys.executable)
        found.append(Engine("transformers", python, "transformers_runner", _is_dense_bf16))
    return found


def plan_for(model: Path, cases: list[Case], threads: int) -> Plan:
    """What a process does for these cases of one model."""
    shape = cases[0].shape
    longest = max(case.task.prompt + case.task.output for case in cases) + _ROOM
    tokens = max(
        case.task.batch * (case.task.prompt + 2 * case.task.output + _ROOM) for case in cases
    )
    return Plan(
        model=str(model.absolute()),
        threads=threads,
        vocab_size=shape["vocab_size"],
        max_model_len=min(2 * longest, shape["max_position_embeddings"]),
        kv_bytes=max(1 << 30, 2 * tokens * shape.kv_bytes_per_token),
        started=time.time(),
        tasks=tuple(case.task for case in cases),
    )


def run(engine: Engine, plan: Plan) -> list[dict[str, Any]]:
    """The lines that a runner prints.

    Raises:
        RuntimeError: It failed; the end of what it wrote is in the message.
    """
    command = [engine.python, "-m", f"benchmarks.cpu.runners.{engine.module}"]
    plan = plan._replace(started=time.time())
    done = subprocess.run(
        [*map(str, command), json.dumps(plan)],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if done.returncode != 0 or len(lines) != len(plan.tasks):
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"{engine.name} ended with {done.returncode}:\n{said}")
    return [json.loads(line) for line in lines]


def environment() -> dict[str, str]:
    """This process's own, without what would choose threads for the runners."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
