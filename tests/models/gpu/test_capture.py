"""What a captured step may not do: wait for the device, or take its sizes from it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[3] / "packages" / "models" / "src" / "vllm_models"
WAITS = {"item", "tolist", "nonzero", "unique", "cpu", "numpy", "synchronize", "masked_select"}
MAKES = {"tensor", "as_tensor", "from_numpy"}  # of torch: copies from pageable memory
OUTSIDE = {  # of the captured part of a step, on purpose: what sends, fetches, or sets up
    "runner/device/upload.py",
    "runner/device/fetch.py",
    "runner/device/capture.py",
    "runner/device/assemble.py",
    "runner/device/step.py",
    "gpu/edits.py",
}
SET_UP = {"variants", "reference", "__init__"}


def captured_files() -> list[str]:
    found = [*SOURCES.glob("gpu/*.py"), *SOURCES.glob("runner/device/*.py")]
    names = {str(path.relative_to(SOURCES)) for path in found}
    assert names >= OUTSIDE
    return sorted(names - OUTSIDE)


def faults(source: str) -> Iterator[str]:
    """Calls and subscripts that would make the host wait."""
    for function in _launching(ast.parse(source)):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name, owner = node.func.attr, node.func.value
                is_torch = isinstance(owner, ast.Name) and owner.id == "torch"
                is_numpy = isinstance(owner, ast.Name) and owner.id == "np"
                if (name in WAITS and not is_numpy) or (is_torch and name in MAKES):
                    yield f"line {node.lineno}: {ast.unparse(node)[:60]}"
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare):
                yield f"line {node.lineno}: {ast.unparse(node)[:60]}"


def _launching(module: ast.Module) -> Iterator[ast.stmt]:
    """Functions that launch: not those under `triton.jit`, of references, or of setting up."""
    for node in module.body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            is_function = isinstance(part, ast.FunctionDef)
            if is_function and not _is_set_up(part.name) and not _is_kernel(part):
                yield part


def _is_set_up(name: str) -> bool:
    return name in SET_UP or name.startswith("reference")


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("name", captured_files())
def test_a_captured_file_never_waits_for_the_device(name: str) -> None:
    assert not list(faults((SOURCES / name).read_text()))


@pytest.mark.parametrize(
    "line",
    ["x.item()", "x.tolist()", "x.nonzero()", "x.cpu()", "torch.tensor(3)", "x[x > 0]"],
)
def test_the_check_finds_what_it_looks_for(line: str) -> None:
    assert list(faults(f"def launch(x):\n    return {line}\n"))
    assert not list(faults(f"def reference(x):\n    return {line}\n"))
    assert not list(faults(f"@triton.jit\ndef _kernel(x):\n    return {line}\n"))
