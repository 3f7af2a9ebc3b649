"""Every variant of every kernel compiles for the GPUs that are served, as recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "gpu_kernels.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The tool in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if "TRITON_INT" not in name}
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_variant_compiles_fits_and_is_recorded() -> None:
    done = run("--check", "--changed")
    assert done.returncode == 0, f"{done.stderr}\nrun: python tools/gpu_kernels.py --changed"


@pytest.mark.slow
def test_recorded_figures_are_those_of_the_compiler() -> None:
    """One module anew, though nothing changed: the record is not trusted."""
    done = run("--check", "--module", "rms_norm", "--arch", "90")
    assert done.returncode == 0, done.stderr
    assert "rms_norm" in done.stdout
