"""Products with weights of 8-bit floats, with activations of 16 bits and of 8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_models.gpu import fp8_matmul
from vllm_models.gpu.layout import Planes, numbers_of
from vllm_models.quantization.on_gpu import fp8_planes


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def planes_of(rows: int, columns: int, group: int | None, device: torch.device) -> Planes:
    """Random weights of which `group` columns share a scale."""
    codes = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(rows, 1 if group is None else -(-columns // group)) + 0.5
    return fp8_planes(codes.to(device), scales.to(device), group)


def activations(rows: int, columns: int, device: torch.device) -> Tensor:
    """Numbers that are 8-bit floats already if as many columns as there are share a scale."""
    x = torch.randn(rows, columns).to(torch.float8_e4m3fn).float()
    x[:, ::32] = 448
    return (x * 2.0 ** torch.randint(-5, 6, (rows, 1))).to(device)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    error = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
    assert error < share


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33])
@pytest.mark.parametrize("group", [None, 128, 48])
def test_a_product_is_that_of_the_numbers(
    group: int | None, rows: int, device: torch.device
) -> None:
    planes = planes_of(21, 200, group, device)
    x, bias = torch.randn(rows, 200).to(device), torch.randn(21).to(device)
    found = fp8_matmul.fp8_matmul(x, planes, bias)
    close(found, x @ numbers_of(planes).T + bias, 1e-5)


@pytest.mark.parametrize(("columns", "group"), [(100, 100), (1500, 1500), (300, 128), (64, 128)])
@pytest.mark.parametrize("padding", [0, 3])
def test_activations_are_scaled_by_their_largest(
    columns: int, group: int, padding: int, device: torch.device
) -> None:
    x = activations(4, columns, device).bfloat16()
    x[2] = 0
    codes, scales = fp8_matmul.quantize_rows(x, group, padding)
    assert codes.shape == (4 + padding, columns)
    spread = scales.repeat_interleave(group, 1)[:, :columns]
    assert torch.equal((codes.float() * spread)[:4], x.float())
    assert not bool(codes[4:].float().any())
    assert codes.float().abs().amax(1)[[0, 1, 3]].tolist() == [448.0] * 3


def test_activations_are_rounded_to_the_nearest(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter does not carry when it rounds")
    x = torch.randn(4, 256, device=device)
    codes, scales = fp8_matmul.quantize_rows(x, 256)
    assert torch.equal(codes.float(), (x / scales).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("rows", [1, 17, 70])
def test_groups_of_activations_and_weights_are_scaled_apart(
    rows: int, device: torch.device
) -> None:
    planes = planes_of(37, 320, 128, device)
    x, bias = activations(rows, 320, device), torch.randn(37).to(device)
    x[:, 128:256] /= 64
    out = torch.full((rows, 40), torch.nan, device=device)
    quantized = fp8_matmul.quantize_rows(x, 128)
    found = fp8_matmul.matmul_groups(*quantized, planes, bias, x.dtype, out[:, 3:])
    close(found, fp8_matmul.reference(x, planes, bias), 1e-4)
    close(found, fp8_matmul.reference(x, planes, bias, group=128), 1e-4)
    assert bool(out[:, :3].isnan().all())


def test_the_path_follows_from_the_device_and_the_shape(device: torch.device) -> None:
    new, old, none, bf16 = (9, 0), (8, 0), (0, 0), torch.bfloat16
    rows = planes_of(32, 256, None, device)
    groups = planes_of(32, 256, 128, device)
    odd = planes_of(20, 256, None, device)
    assert fp8_matmul.fp8_path(64, rows, bf16, new) == "library"
    assert fp8_matmul.fp8_path(64, groups, bf16, new) == "groups"
    assert fp8_matmul.fp8_path(4, rows, bf16, new) == "numbers"
    assert fp8_matmul.fp8_path(64, planes_of(32, 256, 64, device), bf16, new) == "numbers"
    for planes, dtype, capability in (
        (rows, bf16, old),
        (rows, bf16, none),
        (rows, torch.float16, new),
        (odd, bf16, new),
    ):
        assert fp8_matmul.fp8_path(64, planes, dtype, capability) == "numbers"


@pytest.mark.parametrize("group", [None, 128])
def test_each_path_gives_the_same_product(
    group: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's product of 8-bit floats runs on a CPU too, if slowly."""
    if device.type == "cpu":
        monkeypatch.setattr(fp8_matmul, "_capability", lambda _: (9, 0))
    x = activations(18, 256, device).bfloat16()
    planes, bias = planes_of(32, 256, group, device), torch.randn(32).to(device)
    expected = fp8_matmul.reference(x, planes, bias)
    out = torch.full((18, 40), torch.nan, dtype=x.dtype, device=device)
    close(fp8_matmul.fp8_matmul(x, planes, bias, out[:, :32]), expected, 0.01)
    assert bool(out[:, 32:].isnan().all())
    close(fp8_matmul.fp8_matmul(x, planes, bias), expected, 0.01)
    close(fp8_matmul.fp8_matmul(x, planes, bias, fixed_order=True), expected, 0.01)
