"""The operators of a layer hand their work to the Triton kernels where these compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm_models.components.norm import OffsetRMSNorm, RMSNorm, UnitRMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.gpu import kernels, launch
from vllm_models.kernels import clamped_swiglu, gelu_mul, rms_norm, rope, silu_mul
from vllm_models.kernels.kv_side import KVSide


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers that were called, on the CPU as well."""
    names: list[str] = []

    def heard(name: str) -> Callable[..., object]:
        launcher = getattr(kernels, name)
        return lambda *args: (names.append(name), launcher(*args))[1]

    for name in ("rms_norm", "add_rms_norm", "silu_mul", "gelu_mul", "clamped_swiglu"):
        monkeypatch.setattr(kernels, name, heard(name))
    for name in ("rope", "rope_write", "kv_write"):
        monkeypatch.setattr(kernels, name, heard(name))
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "mode", lambda: "interpret")
    return names


def test_gates(device: torch.device, called: list[str]) -> None:
    x = noise(3, 40).to(device)
    for module, limits in ((silu_mul, ()), (gelu_mul, ()), (clamped_swiglu, (1.702, 3.0))):
        got = getattr(module, module.__name__.rpartition(".")[2])(x, *limits)
        torch.testing.assert_close(got, module.reference(x, *limits))
    assert called == ["silu_mul", "gelu_mul", "clamped_swiglu"]


@pytest.mark.parametrize("kind", [RMSNorm, OffsetRMSNorm])
def test_norms(device: torch.device, called: list[str], kind: type[RMSNorm]) -> None:
    x, residual, norm = noise(3, 40).to(device), noise(4, 40).to(device)[1:], kind(40, 1e-5)
    norm.weight.data = noise(40).to(device)
    torch.testing.assert_close(norm(x), rms_norm.reference(x, *norm.terms()))
    torch.testing.assert_close(UnitRMSNorm(1e-5)(x), rms_norm.reference(x, None, 1e-5))
    total, normed = norm.after(residual, x)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(normed, rms_norm.reference(total, *norm.terms()))
    alone, normed = norm.after(x, None)
    assert alone is x
    torch.testing.assert_close(normed, rms_norm.reference(x, *norm.terms()))
    assert called == ["rms_norm", "rms_norm", "add_rms_norm", "rms_norm"]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_rotations(device: torch.device, called: list[str], is_quantized: bool) -> None:
    qkv, angle = noise(3, 8, 16).to(device), noise(3, 1, 8).to(device)
    q, k, v = qkv.split((4, 2, 2), dim=1)
    cos = torch.cat((angle.cos(), angle.cos()), -1)
    rotation = Rotation(cos, torch.cat((-angle.sin(), angle.sin()), -1))
    norm = OffsetRMSNorm(16, 1e-5)
    norm.weight.data = noise(16).to(device)
    wanted = rope.reference(rms_norm.reference(q, *norm.terms()), *rotation)
    torch.testing.assert_close(rotation(q, norm), wanted)
    dtype = torch.int8 if is_quantized else torch.float32
    keys, values = (
        KVSide(
            torch.zeros((5, 2, 8, 16), dtype=dtype, device=device),
            torch.zeros((5, 2, 8), device=device) if is_quantized else None,
        )
        for _ in range(2)
    )
    slots = torch.tensor([39, 0, 17], device=device)
    got = rotation.write((q, k, v), (norm, None), (keys, values), slots)
    torch.testing.assert_close(got, wanted)
    for side, expected in ((keys, rope.reference(k, *rotation)), (values, v)):
        stored = side.data[slots // 8, :, slots % 8].float()
        if side.scales is not None:
            stored = stored * side.scales[slots // 8, :, slots % 8][..., None]
        tolerance = 0.02 if is_quantized else 1e-5
        torch.testing.assert_close(stored, expected, atol=tolerance, rtol=1e-5)
    assert called == ["rope", "rope_write"]
