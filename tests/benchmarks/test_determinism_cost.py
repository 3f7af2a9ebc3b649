"""The price of a fixed order: both sides do the same work, and every kernel has a row."""

from __future__ import annotations

import pytest
import torch
from vllm_models.native.library import Library, library

from benchmarks.cpu import determinism


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = library()
    if found is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setattr(determinism, "WEIGHTS", 1 << 20)
    monkeypatch.setattr(determinism, "ROUNDS", 1)
    return found


@pytest.mark.parametrize("rows", [1, 8])
def test_both_orders_multiply_the_same_numbers(built: Library, rows: int) -> None:
    [(_, pair)] = determinism._products(built, (128, 64), [rows])
    torch.testing.assert_close(pair.fixed(), pair.fastest(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [2, 64])
def test_both_orders_attend_from_equally_many_heads(built: Library, rows: int) -> None:
    pair = determinism._attention(built, rows)
    fixed, fastest = pair.fixed(), pair.fastest()
    assert isinstance(fixed, torch.Tensor) and isinstance(fastest, torch.Tensor)
    assert fixed.numel() == fastest.numel()


def test_every_kernel_has_a_row_and_the_layer_is_their_sum(built: Library) -> None:
    found = list(determinism.figures(built, [1]))
    assert [row["kernel"] for row in found] == [
        *("qkv", "o", "gate_up", "down"),
        *("attention", "layer"),
    ]
    for side in ("fixed us", "fastest us"):
        parts = [float(row[side]) for row in found]
        assert parts[-1] == pytest.approx(sum(parts[:-1]))
