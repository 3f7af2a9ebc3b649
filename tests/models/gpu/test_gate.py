"""Gated activations against plain torch."""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import gate

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Where the interpreter says so, a GPU computes 1 / (1 + inf).
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
LIMITS = {"silu_mul": (), "gelu_mul": (), "clamped_swiglu": (1.702, 3.0)}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds no numbers."""
    monkeypatch.setattr(gate.torch, "empty", poisoned)


def poisoned(*shape: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(*shape, torch.nan, dtype=dtype, device=device)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 160), (2, 6002)])
@pytest.mark.parametrize("name", LIMITS)
def test_gated_activations(
    device: torch.device, name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, tolerance = noise(*shape).to(device, dtype), DTYPES[dtype]
    got = getattr(gate, name)(x, *LIMITS[name])
    wanted = gate.reference(x, name, *LIMITS[name])
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", LIMITS)
def test_rows_may_be_apart(device: torch.device, name: str) -> None:
    x = noise(5, 100).to(device)
    for rows in (x[:, 10:70], x[::2], noise(60, 5).to(device).T):
        got = getattr(gate, name)(rows, *LIMITS[name])
        torch.testing.assert_close(got, gate.reference(rows, name, *LIMITS[name]))


@pytest.mark.parametrize("name", LIMITS)
def test_large_numbers_stay_numbers_and_others_are_seen(device: torch.device, name: str) -> None:
    x = torch.tensor([[3e4, -3e4, -200.0, 1.0, 2.0, 3.0]], device=device)
    torch.testing.assert_close(
        getattr(gate, name)(x, *LIMITS[name]), gate.reference(x, name, *LIMITS[name])
    )
    lost = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]], device=device)
    assert getattr(gate, name)(lost, *LIMITS[name]).isnan().all()
