"""The norm of rows against plain torch, with and without what is added before."""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import rms_norm

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds no numbers."""
    monkeypatch.setattr(rms_norm.torch, "empty", poisoned)


def poisoned(*shape: object, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(*shape, torch.nan, dtype=dtype, device=device)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = DTYPES[wanted.dtype]
    assert got.dtype == wanted.dtype and got.is_contiguous()
    torch.testing.assert_close(got.float(), wanted.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (13, 48), (3, 5, 80), (2, 2, 2, 128), (2, 5120)])
def test_rows_of_any_width(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = (t.to(device) for t in (noise(*shape, dtype=dtype) * 3, noise(shape[-1])))
    for factors, offset in ((weight.to(dtype), 0.0), (weight.to(dtype), 1.0), (None, 0.0)):
        got = rms_norm.rms_norm(x, factors, 1e-5, offset)
        check(got, rms_norm.reference(x, factors, 1e-5, offset))


@pytest.mark.parametrize("width", [16384, 10000])
def test_the_widest_rows(device: torch.device, width: int) -> None:
    x, weight = (t.to(device) for t in (noise(1, width), noise(width)))
    check(rms_norm.rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5))


def test_heads_that_lie_between_others(device: torch.device) -> None:
    qkv, weight = noise(7, 9, 24).to(device), noise(24).to(device)
    for heads in (qkv[:, :4], qkv[:, 4:7], qkv[:, 3:4], qkv[:, :, :16]):
        factors = weight[: heads.shape[-1]]
        got = rms_norm.rms_norm(heads, factors, 1e-6)
        check(got, rms_norm.reference(heads, factors, 1e-6))
    flat = qkv.flatten(1)[:, 24:72]  # rows of a matrix that are apart
    check(rms_norm.rms_norm(flat, None, 1e-6), rms_norm.reference(flat, None, 1e-6))
    turned = qkv.transpose(1, 2)
    check(rms_norm.rms_norm(turned, None, 1e-6), rms_norm.reference(turned, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16), (9, 200), (3, 1024), (2, 3000)])
def test_a_sum_is_rounded_before_it_is_normalised(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, residual = noise(*shape, dtype=dtype).to(device), noise(*shape, dtype=dtype).to(device) * 40
    weight = noise(shape[1], dtype=dtype).to(device)
    total, normed = rms_norm.add_rms_norm(x, residual, weight, 1e-5, 1.0)
    check(total, residual + x)
    if device.type == "cuda" or dtype != torch.bfloat16:  # Triton's interpreter cuts bfloat16 off
        assert torch.equal(total, residual + x)
    check(normed, rms_norm.reference(total, weight, 1e-5, 1.0))
    assert torch.equal(normed, rms_norm.rms_norm(total, weight, 1e-5, 1.0))


def test_summands_may_be_apart(device: torch.device) -> None:
    x, residual = noise(5, 64).to(device)[:, :32], noise(5, 96).to(device)[:, 32:64]
    total, normed = rms_norm.add_rms_norm(x, residual, None, 1e-5)
    assert torch.equal(total, x + residual)
    check(normed, rms_norm.reference(total, None, 1e-5))


@pytest.mark.parametrize("width", [64, 2048])
def test_a_row_does_not_depend_on_the_others(device: torch.device, width: int) -> None:
    x, weight = noise(11, width).to(device), noise(width).to(device)
    together = rms_norm.rms_norm(x, weight, 1e-6)
    for row in (0, 10):
        assert torch.equal(rms_norm.rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


def test_variants_have_names_of_their_own() -> None:
    names = [variant.name for variant in rms_norm.variants()]
    assert len(set(names)) == len(names) >= 4
