"""Products with codes that share scales in groups, and layers of every checkpoint format."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_models.gpu import fp8_matmul, grouped_matmul, grouped_rows, matmul, splits
from vllm_models.gpu.layout import Planes, codes_of, interleave, numbers_of, stack_planes
from vllm_models.quantization.on_gpu import fp8_planes, grouped_planes

from tests.models.quantization import packers
from tests.models.quantization.formats import CASES, GPTQ, Case, load, weight

TABLE = [round(float(value), 2) for value in np.linspace(-1, 1, 16) ** 3]
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "4 bit zeros": {"bits": 4, "group_size": 32, "has_zeros": True},
    "4 bit long groups": {"bits": 4, "group_size": 128},
    "4 bit whole rows": {"bits": 4, "group_size": 1 << 20, "has_zeros": True},
    "4 bit odd groups": {"bits": 4, "group_size": 24, "has_zeros": True},
    "8 bit": {"bits": 8, "group_size": 64},
    "8 bit zeros": {"bits": 8, "group_size": 16, "has_zeros": True},
    "table": {"bits": 4, "group_size": 64, "table": TABLE},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def planes_of(
    rows: int,
    columns: int,
    device: torch.device,
    bits: int = 4,
    group_size: int = 32,
    has_zeros: bool = False,
    table: list[float] | None = None,
) -> tuple[Planes, Tensor]:
    """Random weights and what they stand for."""
    group_size = min(group_size, columns)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(rows, groups) + 0.5
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8) if has_zeros else None
    numbers = codes.float() if table is None else torch.tensor(table).half().float()[codes.long()]
    if table is None:
        middle = torch.full((rows, groups), 1 << (bits - 1))
        spread = (middle if zeros is None else zeros).repeat_interleave(group_size, 1)
        numbers -= spread[:, :columns]
    expected = numbers * scales.repeat_interleave(group_size, 1)[:, :columns]
    planes = grouped_planes(
        codes.to(device),
        scales.to(device),
        None if zeros is None else zeros.to(device),
        bits=bits,
        group_size=group_size,
        table=table,
    )
    return planes, expected


def error(found: Tensor, expected: Tensor) -> float:
    """The largest, as a share of the largest number."""
    return float((found.cpu().float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("columns", "run"), [(256, 32), (384, 16), (40, 32), (1, 16)])
def test_interleaved_codes_come_back(bits: int, columns: int, run: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8)
    plane = interleave(codes, bits, run)
    assert plane.nbytes <= 3 * (columns + 8 * run - 1) * bits / 8
    assert torch.equal(codes_of(plane, bits, run, columns), codes.long())


@pytest.mark.parametrize("kind", FORMATS)
def test_planes_stand_for_the_weight(kind: str, device: torch.device) -> None:
    planes, expected = planes_of(19, 192, device, **FORMATS[kind])
    torch.testing.assert_close(numbers_of(planes).cpu(), expected)
    rows = torch.tensor([18, 0, 18, 7], device=device)
    assert error(grouped_rows.gather_rows(planes, rows), expected[rows.cpu()]) < 1e-6
    some = grouped_rows.dequantize(planes, slice(3, 18), torch.float32)
    assert error(some, expected[3:18]) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 33])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_product_is_that_of_the_numbers(kind: str, rows: int, device: torch.device) -> None:
    columns = 240 if kind == "4 bit odd groups" else 320
    planes, expected = planes_of(37, columns, device, **FORMATS[kind])
    x, bias = torch.randn(rows, columns), torch.randn(37)
    out = torch.full((rows, 50), torch.nan, device=device)
    found = grouped_matmul.grouped_matmul(
        x.to(device), planes, bias.to(device), out[:, 5:42], fixed_order=False
    )
    assert error(found, x @ expected.T + bias) < 1e-5
    assert bool(out[:, :5].isnan().all()) and bool(out[:, 42:].isnan().all())
    reference = grouped_matmul.reference(x.to(device), planes, bias.to(device))
    assert error(found, reference.cpu()) < 1e-5


@pytest.mark.parametrize(("rows", "splits"), [(1, 4), (3, 4), (33, 3), (70, 1)])
def test_columns_are_split_where_rows_are_few(rows: int, splits: int, device: torch.device) -> None:
    planes, expected = planes_of(20, 2048, device)
    form = grouped_matmul.form_for(rows, planes, 4, 1 << 18, fixed_order=False)
    assert form is not None
    assert grouped_matmul.splits_for(rows, planes, form, fixed_order=False) == splits
    assert grouped_matmul.splits_for(rows, planes, form, fixed_order=True) == 4
    x, bias = torch.randn(rows, 2048), torch.randn(20)
    found = grouped_matmul.grouped_matmul(x.to(device), planes, bias.to(device))
    assert error(found, x @ expected.T + bias) < 1e-5


def test_very_many_rows_are_left_to_the_library(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_matmul, "_MANY_ROWS", 5)
    monkeypatch.setattr(grouped_matmul, "_SCRATCH_ELEMENTS", 256 * 8)
    planes, expected = planes_of(20, 256, device)
    x, bias = torch.randn(5, 256), torch.randn(20)
    found = grouped_matmul.grouped_matmul(x.to(device), planes, bias.to(device))
    assert error(found, x @ expected.T + bias) < 1e-5


@pytest.mark.parametrize("rows", [1, 5])
def test_activations_of_16_bits(rows: int, device: torch.device) -> None:
    planes, expected = planes_of(24, 256, device)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(rows, 256).to(dtype)
        found = grouped_matmul.grouped_matmul(x.to(device), planes)
        assert found.dtype == dtype
        assert error(found, x.float() @ expected.T) < 1e-2


def test_no_rows_give_no_rows(device: torch.device) -> None:
    planes, _ = planes_of(24, 256, device)
    assert grouped_matmul.grouped_matmul(torch.ones(0, 256, device=device), planes).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fixed_order_gives_a_row_the_same_bits_in_every_batch(
    dtype: torch.dtype, device: torch.device
) -> None:
    planes, _ = planes_of(24, 512, device, has_zeros=True)
    x = torch.randn(67, 512).to(device, dtype)
    together = grouped_matmul.grouped_matmul(x, planes, fixed_order=True)
    for first, last in ((0, 1), (66, 67), (30, 50)):
        some = grouped_matmul.grouped_matmul(x[first:last], planes, fixed_order=True)
        assert torch.equal(some, together[first:last])


def test_forms_stay_within_the_shared_memory_of_a_device(device: torch.device) -> None:
    planes, _ = planes_of(64, 256, device)
    for rows in (1, 5, 20, 64, 65, 1000):
        for fixed_order in (False, True):
            form = grouped_matmul.form_for(rows, planes, 2, 99 << 10, fixed_order)
            assert form is not None
            assert form.block_m == 1 or form.shared_bytes(planes, 2) <= 99 << 10


def test_stacked_weights_are_one_weight(device: torch.device) -> None:
    first, expected_first = planes_of(5, 64, device, has_zeros=True)
    second, expected_second = planes_of(3, 64, device, has_zeros=True)
    stacked = stack_planes([first, second])
    assert stacked.rows == 8
    numbers = numbers_of(stacked).cpu()
    torch.testing.assert_close(numbers, torch.cat([expected_first, expected_second]))


def test_splits_are_added_up_in_their_order(device: torch.device) -> None:
    parts = torch.randn(4, 3, 1030, device=device)
    bias = torch.randn(1030, device=device)
    out = torch.full((3, 1030), torch.nan, device=device)
    expected = splits.reference(parts, bias, torch.empty_like(out))
    assert torch.equal(splits.add_splits(parts, bias, out), expected)


def test_float_codes_stay_where_they_are(device: torch.device) -> None:
    codes = torch.randn(6, 40).to(device, torch.float8_e4m3fn)
    planes = fp8_planes(codes, torch.ones(6, 3, device=device), 16)
    assert planes.low.data_ptr() == codes.data_ptr()
    assert torch.equal(numbers_of(planes), codes.float())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.usefixtures("on_gpu")
def test_layers_of_every_format_compute_on_the_gpu(case: Case, device: torch.device) -> None:
    config, pack, (rows, columns) = case
    parts = {name: pack(weight(rows, columns, seed)) for seed, name in enumerate("ab")}
    layer = load(config, parts, bias=True)
    assert layer.bias is not None and None not in layer.method.packed_parts(layer)
    expected = torch.from_numpy(np.concatenate([part.weight for part in parts.values()]))
    expected = expected.to(device)
    limit = 1e-3 * float(expected.abs().max()) if "quant_map" in str(parts) else 1e-5
    torch.testing.assert_close(layer.method.dequantize(layer), expected, rtol=1e-3, atol=limit)
    x = torch.randn(3, columns)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.bias, rtol=1e-3, atol=2e-2)


@pytest.mark.usefixtures("on_gpu")
def test_parts_may_differ_in_their_order_of_columns(device: torch.device) -> None:
    parts = {
        name: packers.gptq(weight(8, 96, seed), order_seed=seed + 1)
        for seed, name in enumerate("ab")
    }
    layer = load(GPTQ | {"desc_act": True}, parts)
    expected = torch.from_numpy(np.concatenate([part.weight for part in parts.values()]))
    x = torch.randn(2, 96)
    torch.testing.assert_close(layer(x), x @ expected.to(device).T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_gpu")
def test_codes_take_no_more_memory_than_in_the_checkpoint() -> None:
    layer = load(GPTQ, {"a": packers.gptq(weight(64, 256))})
    assert {name for name, _ in layer.named_parameters()} == {"low_0", "scales_0", "offsets_0"}
    held = sum(parameter.nbytes for parameter in layer.parameters())
    assert held == 64 * 256 // 2 + 64 * 256 // 32 * (2 + 1)


def test_variants_name_every_argument_of_their_kernel() -> None:
    modules = (grouped_matmul, grouped_rows, splits, matmul, fp8_matmul)
    variants = [variant for module in modules for variant in module.variants()]
    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        arguments = set(inspect.signature(variant.kernel.fn).parameters)
        assert set(variant.signature) | set(variant.constants) == arguments, variant.name
