"""The rules by which the report of compiled kernels judges."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The tool as a module; what it does to the environment is undone."""
    spec = importlib.util.spec_from_file_location("gpu_kernels", ROOT / "tools" / "gpu_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_kernels"] = module
    known = os.environ.get("TRITON_INTERPRET")
    spec.loader.exec_module(module)
    if known is not None:
        os.environ["TRITON_INTERPRET"] = known
    return module


def variant(tool: ModuleType, **changes: Any) -> Any:
    return tool.Variant("one", None, {}, {}, **changes)


def compiled(tool: ModuleType, arch: int, *usage: int) -> Any:
    return tool.Compiled("one", arch, tool.Usage(*usage))


def test_spills_are_a_fault_only_where_a_variant_promises_none(tool: ModuleType) -> None:
    spilled = compiled(tool, 90, 255, 16, 0)
    assert not list(tool.faults_of(variant(tool), spilled))
    assert "spills 16" in next(tool.faults_of(variant(tool, no_spills=True), spilled))


def test_more_shared_memory_than_the_gpu_has_is_a_fault(tool: ModuleType) -> None:
    large = 200 << 10
    assert not list(tool.faults_of(variant(tool), compiled(tool, 90, 32, 0, large)))
    assert "shared memory" in next(tool.faults_of(variant(tool), compiled(tool, 80, 32, 0, large)))


def test_what_does_not_compile_is_a_fault(tool: ModuleType) -> None:
    failed = tool.Compiled("one", 90, None, "no such operation")
    assert "no such operation" in next(tool.faults_of(variant(tool), failed))


def test_other_figures_and_other_variants_are_differences(tool: ModuleType) -> None:
    made = tool.Made("source", {"90": tool.Usage(32, 0, 64)})
    more = tool.Made("source", {"90": tool.Usage(40, 0, 64)})
    assert not list(tool.differences({"one": made}, {"one": made}))
    assert "is recorded" in next(tool.differences({"one": made}, {"one": more}))
    assert "no variant" in next(tool.differences({"one": made}, {}))
    assert "not recorded" in next(tool.differences({}, {"one": made}))


def test_the_document_has_a_row_per_variant(tool: ModuleType) -> None:
    made = tool.Made("source", {"80": tool.Usage(32, 0, 2048), "90": tool.Usage(40, 8, 0)})
    lines = tool.markdown({"one": made}, "3.7").splitlines()
    assert lines[-3:] == [
        "| variant | sm_80 | sm_90 |",
        "|---|---|---|",
        "| `one` | 32 / 0 / 2 | 40 / 8 / 0 |",
    ]


def test_a_variant_in_fp8_is_not_compiled_for_a_gpu_without(tool: ModuleType) -> None:
    assert tool.archs_of(variant(tool), [80, 90]) == [80, 90]
    plain = tool.Variant("one", None, {"codes": "*fp8e4nv"}, {})
    assert tool.archs_of(plain, [80, 90]) == [90]
