"""Who may import whom, and what an import must not bring along."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a statement loads in a fresh interpreter."""
    code = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_packages_keep_to_their_layers() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(program), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["vllm_traits", "vllm_core", "vllm_core.testing"])
def test_the_core_is_standard_library_only(module: str) -> None:
    brought = loaded_by(f"import {module}") - loaded_by("pass")
    foreign = {name for name in brought if name not in sys.stdlib_module_names}
    assert foreign <= {"vllm_traits", "vllm_core"}


@pytest.mark.parametrize("module", ["vllm_server.cli", "vllm_models", "vllm_lite", "vllm_dist"])
def test_a_light_import_does_not_load_the_heavy_ones(module: str) -> None:
    heavy = {"torch", "numpy", "transformers", "starlette", "pydantic", "tokenizers", "uvicorn"}
    assert not heavy & loaded_by(f"import {module}")
