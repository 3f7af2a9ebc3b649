"""The benchmark of attention measures what it says."""

from __future__ import annotations

import pytest
from vllm_models.native.library import library

from benchmarks.cpu import attention


class Steady:
    """A machine of known speed."""

    def read(self, rounds: int) -> float:
        return 1e9


@pytest.mark.skipif(library() is None, reason="no native kernels here")
@pytest.mark.parametrize(("kind", "bytes_per_number"), [("bf16", 2), ("int8", 1 + 4 / 128)])
def test_bytes_are_those_of_one_layer(
    monkeypatch: pytest.MonkeyPatch, kind: str, bytes_per_number: float
) -> None:
    monkeypatch.setattr(attention, "KV_BYTES", 1 << 20)
    monkeypatch.setattr(attention, "seconds", lambda run, rounds: (run(), 1.0)[1])
    found = attention.measured(Steady(), attention.Case.of("3x40"), kind)
    per_block = 16 * 8 * (128 + 128) * bytes_per_number
    layers = 1 + (1 << 20) // int(10 * per_block)  # one block more pads tables
    assert found["us"] == pytest.approx(1e6 / layers)
    assert (
        found["of read"]
        == pytest.approx(found["GB/s"])
        == pytest.approx(9 * per_block * layers / 1e9)
    )
