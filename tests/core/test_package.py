"""What the package offers, and what it must not contain."""

from __future__ import annotations

from pathlib import Path

import vllm_core
import vllm_core.testing


def test_the_public_names_are_these() -> None:
    assert sorted(vllm_core.__all__) == [
        "AsyncEngine",
        "Engine",
        "EngineHealth",
        "EngineStats",
        "Histogram",
        "RequestStream",
        "Scheduler",
        "SchedulerConfig",
        "SyncStream",
    ]
    assert sorted(vllm_core.testing.__all__) == [
        "DelayedBackend",
        "DictStore",
        "FakeBackend",
        "SimBackend",
        "next_token",
        "violations",
    ]
    for module in (vllm_core, vllm_core.testing):
        assert all(hasattr(module, name) for name in module.__all__)


def test_the_core_knows_no_phases() -> None:
    sources = list(Path(vllm_core.__file__).parent.rglob("*.py"))
    assert len(sources) > 15
    for path in sources:
        assert "is_prefill" not in path.read_text("utf-8"), path
