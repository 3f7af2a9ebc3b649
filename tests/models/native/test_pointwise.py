"""The small work between products against its textbook form, on every class of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_models.kernels.angles import reference as angles_reference
from vllm_models.kernels.rope import reference as rope_reference
from vllm_models.native.library import Library, load
from vllm_models.native.pointwise import gate, rms_norm, rotate_heads, turn_angles
from vllm_models.native.processor import runnable

DTYPES = [torch.bfloat16, torch.float32]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-6}


@pytest.fixture(params=runnable())
def library(request: pytest.FixtureRequest) -> Library:
    torch.manual_seed(0)
    return load(request.param)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    assert found.dtype == dtype and found.shape == expected.shape
    return torch.allclose(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def normal(x: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 33, 128, 1000])
def test_norm(library: Library, dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(3, 5, width) * 3).to(dtype)
    weight = torch.randn(width).to(dtype)
    expected = normal(x, 1e-5) * (weight.double() + 1)
    assert near(rms_norm(library, x, weight, 1e-5, offset=1.0), expected, dtype)
    assert near(rms_norm(library, x, None, 1e-5), normal(x, 1e-5), dtype)
    rows = x.flatten(0, 1)[:, : max(1, width - 1)]  # rows that are apart
    assert near(rms_norm(library, rows, None, 1e-5), normal(rows, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_after_a_residual_keeps_the_sum(library: Library, dtype: torch.dtype) -> None:
    x, residual = torch.randn(4, 40).to(dtype), torch.randn(4, 40).to(dtype)
    weight, expected = torch.randn(40).to(dtype), x + residual
    out = rms_norm(library, x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, expected)
    assert near(out, normal(expected, 1e-5) * weight.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 31, 160])
def test_gates(library: Library, dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(7, 2 * width) * 4).to(dtype)
    x[0, 0] = -200.0
    first, second = x.double().chunk(2, -1)
    assert near(gate(library, x, "silu"), F.silu(first) * second, dtype)
    gelu = F.gelu(first, approximate="tanh") * second
    assert near(gate(library, x, "gelu_tanh"), gelu, dtype)
    limited = first.clamp(max=0.5)
    clamped = limited * torch.sigmoid(1.702 * limited) * (second.clamp(-0.5, 0.5) + 1)
    assert near(gate(library, x, "clamped_swiglu", 1.702, 0.5), clamped, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("count", [1, 5, 400])
@pytest.mark.parametrize("pairs", [1, 12, 64])
def test_angles(library: Library, interleaved: bool, count: int, pairs: int) -> None:
    positions = torch.randint(0, 200_000, (count,))
    frequencies = 1e4 ** -(torch.arange(pairs) / pairs)
    given = (positions, frequencies, 1.25)
    for dtype, tolerance in ((torch.float32, 3e-7), (torch.bfloat16, 1e-2)):
        expected = angles_reference(*given, dtype, interleaved)
        found = turn_angles(library, *given, dtype, interleaved)
        for mine, other in zip(found, expected, strict=True):
            assert mine.dtype == dtype and mine.shape == other.shape
            assert torch.allclose(mine, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (96, 48), (10, 6)])
def test_rotation(
    library: Library, dtype: torch.dtype, interleaved: bool, dim: int, rotated: int
) -> None:
    wide = torch.randn(3, 7, dim).to(dtype)
    angle = torch.rand(3, 1, rotated // 2) * 6
    angles = torch.repeat_interleave(angle, 2, -1) if interleaved else torch.cat((angle, angle), -1)
    sign = torch.ones(rotated)
    sign[slice(0, None, 2) if interleaved else slice(0, rotated // 2)] = -1
    cos, sin = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)
    weight = torch.randn(dim).to(dtype)

    expected = normal(wide[:, :6], 1e-6) * weight.double()
    part = expected[..., :rotated]
    pairs = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = pairs if interleaved else part.roll(rotated // 2, -1)
    part = part * cos.double() + turned * sin.double()
    expected = torch.cat((part, expected[..., rotated:]), -1)

    out = rotate_heads(library, wide[:, :6], (cos, sin), interleaved, (weight, 1e-6))
    assert near(out, expected, dtype)
    plain = rotate_heads(library, wide[:, :6], (cos, sin), interleaved)
    assert near(plain, rope_reference(wide[:, :6], cos, sin, interleaved).double(), dtype)


def test_many_rows_give_the_same_bits_as_one(library: Library) -> None:
    x, weight = torch.randn(700, 64), torch.randn(64)
    whole = rms_norm(library, x, weight, 1e-6)
    assert torch.equal(whole[600:601], rms_norm(library, x[600:601], weight, 1e-6))
    gated = gate(library, torch.cat((x, x, x, x), -1)[:, :256], "silu")
    assert torch.equal(gated[600:601], gate(library, x[600:601].repeat(1, 4), "silu"))
