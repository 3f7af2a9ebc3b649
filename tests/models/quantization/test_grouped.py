"""Integers with scales in the CPU's kernels, on every instruction-set class.

Kernels round activations to 8 bits, and scales that have more than 16 bits: by 2**-11 of
themselves at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm_models.components.linear import Linear
from vllm_models.native.blocks import (
    PackedBlocks,
    fits_groups,
    keeps_scales,
    pack_grouped,
    round_activations,
)
from vllm_models.native.library import library, load
from vllm_models.native.ordered import OrderedBlocks
from vllm_models.native.processor import InstructionSet, runnable
from vllm_models.quantization.awq import repack_awq, unpack_awq
from vllm_models.quantization.grouped import pack_codes, unpack_codes

from tests.models.quantization import packers
from tests.models.quantization.formats import CASES, GPTQ, Case, weight
from tests.models.quantization.formats import load as load_layer
from tests.models.quantization.packers import Packed

NUMBERS = ("gptq", "marlin", "awq", "ints")
HELD = {name: case for name, case in CASES.items() if name.startswith(NUMBERS)}
LEFT_TO_TORCH = "gptq 8 bit desc_act"  # groups of 16


@pytest.fixture(params=runnable(), autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_LITE_NATIVE", request.param)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture(params=[name for name in HELD if name != LEFT_TO_TORCH])
def case(request: pytest.FixtureRequest) -> Case:
    return HELD[request.param]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def expected_of(x: Tensor, parts: list[Packed], orders: list[Tensor | None]) -> Tensor:
    """Products in float64 of what the kernels multiply."""
    products: list[Tensor] = []
    for part, order in zip(parts, orders, strict=True):
        whole = torch.from_numpy(part.weight).double()
        held = x if order is None else x[:, order]
        ordered = whole if order is None else whole[:, order]
        products.append(round_activations(held).double() @ ordered.T)
    return torch.cat(products, 1)


def orders_of(layer: Linear) -> list[Tensor | None]:
    packed = layer.packed
    return [s.order for s in packed.weights] if isinstance(packed, OrderedBlocks) else [None]


def near(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    return bool((found.double() - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_weights_and_rounded_activations(
    case: Case, dtype: torch.dtype
) -> None:
    config, pack, (rows, columns) = case
    part = pack(weight(rows, columns))
    layer = load_layer(config, {"only": part}, bias=True)
    assert layer.packed is not None and layer.bias is not None
    assert near(layer.packed.dequantize(), torch.from_numpy(part.weight).double(), 1e-6)
    x = numbers(5, columns).to(dtype)
    expected = expected_of(x, [part], orders_of(layer)) + layer.bias.double()
    found = layer(x)
    assert found.dtype == dtype
    assert near(found, expected, 2e-6 if dtype == torch.float32 else 4e-3)
    for row in range(5):
        assert torch.equal(layer(x[row : row + 1]), found[row : row + 1])


def test_the_packed_weight_is_all_that_is_held(case: Case) -> None:
    config, pack, shape = case
    layer = load_layer(config, {"only": pack(weight(*shape))})
    names = {name for name, _ in layer.named_parameters()}
    assert names - {"orders"} == {"blocks_0"}
    assert None not in layer.method.packed_parts(layer)


def test_parts_may_sort_their_columns_differently() -> None:
    parts = {
        name: packers.gptq(weight(rows, 64, rows), order_seed=seed)
        for name, rows, seed in (("q", 16, 1), ("k", 8, 2), ("v", 24, None))
    }
    layer = load_layer(GPTQ | {"desc_act": True}, parts, bias=True)
    assert isinstance(layer.packed, OrderedBlocks)
    stacked = torch.from_numpy(np.concatenate([part.weight for part in parts.values()]))
    assert near(layer.packed.dequantize(), stacked.double(), 1e-6)
    some = torch.tensor([40, 0, 17])
    assert torch.equal(layer.method.gather(layer, some), layer.packed.dequantize()[some])
    x = numbers(3, 64)
    expected = expected_of(x, list(parts.values()), orders_of(layer))
    bias = cast(Tensor, layer.bias)
    assert near(layer(x), expected + bias.double())
    out = torch.full((3, 50), torch.nan)
    layer.packed.matmul(x, bias, out=out[:, 2:])
    assert torch.equal(out[:, 2:], layer(x)) and out[:, :2].isnan().all()
    short = layer.packed.matmul(x.bfloat16(), dtype=torch.float32)
    assert torch.equal(short, layer.packed.matmul(x.bfloat16().float()))


def test_groups_that_no_record_holds_are_left_to_torch() -> None:
    config, pack, shape = CASES[LEFT_TO_TORCH]
    part = pack(weight(*shape))
    layer = load_layer(config, {"only": part})
    assert layer.packed is None and layer.method.packed_parts(layer) == [None]
    x = numbers(3, shape[1])
    assert near(layer(x), x.double() @ torch.from_numpy(part.weight).double().T)


def test_scales_beyond_16_bits_are_left_to_torch() -> None:
    part = packers.gptq(weight(8, 64))
    part.tensors["scales"] = part.tensors["scales"].float() * 1e-6 * (1 + 1e-4)
    layer = load_layer(GPTQ, {"only": part})
    assert layer.packed is None


@pytest.mark.parametrize(
    ("scales", "is_kept"),
    [
        (torch.tensor([0.1, 3.0, 6e-5, 0.0]), True),
        (torch.tensor([1e-30]).bfloat16().float(), True),  # bfloat16 holds it
        (torch.tensor([1e-7]), False),
        (torch.tensor([1e6 + 1]), False),
        (torch.tensor([1e-7]).half(), True),
    ],
)
def test_scales_are_rounded_by_no_more_than_half_a_unit_of_float16(
    scales: Tensor, is_kept: bool
) -> None:
    assert keeps_scales(scales) == is_kept


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 160, 192, 256, 960])
def test_groups_of_any_multiple_of_32_columns_are_packed(group_size: int) -> None:
    columns = group_size if group_size > 480 else group_size * 3
    random = torch.Generator().manual_seed(group_size)
    codes = torch.randint(0, 16, (20, columns), dtype=torch.uint8, generator=random)
    scales = torch.rand((20, columns // group_size), generator=random).half()
    zeros = torch.randint(0, 17, scales.shape, generator=random)
    assert fits_groups(columns, group_size)
    spread = [t.float().repeat_interleave(group_size, 1) for t in (scales, zeros)]
    library = load(InstructionSet(runnable()[0]))
    packed = pack_grouped(library, pack_codes(codes, 4), scales, zeros, 4)
    assert isinstance(packed, PackedBlocks)
    torch.testing.assert_close(packed.dequantize(), spread[0] * (codes - spread[1]))


def test_groups_of_other_sizes_do_not_fit() -> None:
    assert fits_groups(100, 100)
    assert not fits_groups(64, 16) and not fits_groups(96, 48)


@pytest.mark.parametrize(("columns", "outputs"), [(2, 8), (6, 128), (64, 136), (10, 520)])
def test_awq_words_are_turned_as_torch_turns_them(columns: int, outputs: int) -> None:
    words = torch.randint(-(2**31), 2**31, (columns, outputs // 8)).to(torch.int32)
    codes = unpack_codes(repack_awq(words), 4)
    assert torch.equal(codes, unpack_awq(words))
