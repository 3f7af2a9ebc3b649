"""Weights packed by each format's published layout against the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm_models.components.linear import Linear
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.scheme import scheme_for
from vllm_models.quantization.separate import Separate
from vllm_traits import ModelError

from tests.models.quantization import packers
from tests.models.quantization.formats import (
    AWQ,
    CASES,
    FP8,
    GPTQ,
    NF4,
    Case,
    compressed,
    fields,
    floats,
    integers,
    load,
    saved_tensors,
    weight,
)
from tests.models.quantization.packers import Packed

pytestmark = pytest.mark.usefixtures("torch_products")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_the_packed_weight_is_the_one_that_was_meant(case: Case) -> None:
    config, pack, shape = case
    packed = pack(weight(*shape))
    layer = load(config, {"only": packed})
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(packed.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantized_weight(case: Case, dtype: torch.dtype) -> None:
    config, pack, shape = case
    packed = pack(weight(*shape))
    layer = load(config, {"only": packed}, bias=True)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(3)).to(dtype)
    assert layer.bias is not None
    expected = x.double() @ torch.from_numpy(packed.weight).double().T + layer.bias.double()
    out = layer.method.apply(layer, x, layer.bias.to(dtype))
    assert out.dtype == dtype
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < (1e-6 if dtype is torch.float32 else 1e-2)


def test_parts_are_stacked_in_one_layer(case: Case) -> None:
    config, pack, (rows, columns) = case
    parts = {name: pack(weight(rows, columns, seed)) for seed, name in enumerate("qkv")}
    layer = load(config, parts)
    stacked = np.concatenate([part.weight for part in parts.values()])
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(stacked))
    x = torch.randn(2, columns)
    expected = x @ torch.from_numpy(stacked).T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_integers_are_held_in_their_bits(case: Case) -> None:
    """No float copy stays beside the codes."""
    config, pack, shape = case
    layer = load(config, {"only": pack(weight(*shape))})
    codes = dict(layer.named_parameters())["codes"]
    assert codes.nbytes <= shape[0] * shape[1]
    others = sum(
        p.nbytes for name, p in layer.named_parameters() if name not in ("codes", "orders")
    )
    assert others <= codes.nbytes


def test_parts_may_sort_their_columns_differently() -> None:
    parts = {
        name: packers.gptq(weight(rows, 64, rows), order_seed=seed)
        for name, rows, seed in (("q", 16, 1), ("k", 8, 2), ("v", 24, None))
    }
    layer = load(GPTQ | {"desc_act": True}, parts)
    stacked = torch.from_numpy(np.concatenate([part.weight for part in parts.values()]))
    assert torch.equal(layer.method.dequantize(layer), stacked)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ stacked.T, rtol=1e-4, atol=1e-3)


def test_an_order_that_changes_nothing_is_dropped() -> None:
    layer = load(GPTQ | {"desc_act": True}, {"only": packers.gptq(weight(8, 64))})
    assert {name for name, _ in layer.named_parameters()} == {"codes", "scales", "zeros"}


@pytest.mark.parametrize("placeholder", [-1, 0])
def test_groups_that_were_never_set_are_neighbours(placeholder: int) -> None:
    packed = packers.gptq(weight(8, 64))
    packed.tensors["g_idx"].fill_(placeholder)
    layer = load(GPTQ, {"only": packed})
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(packed.weight))


def test_a_zero_point_of_0_borrows_from_its_neighbour_in_version_1() -> None:
    positive = np.abs(weight(16, 64)) + 1
    packed = packers.gptq(positive)
    assert not bool(packers.gptq(positive, version=2).tensors["qzeros"].any())
    layer = load(GPTQ, {"only": packed})
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(packed.weight))


def test_packed_and_plain_parts_share_a_layer() -> None:
    plain = weight(8, 64, 5)
    parts = {
        "q": packers.gptq(weight(16, 64)),
        "k": Packed({"weight": torch.from_numpy(plain)}, plain),
    }
    layer = load(GPTQ, parts, bias=True)
    assert isinstance(layer.method, Separate)
    stacked = torch.from_numpy(np.concatenate([part.weight for part in parts.values()]))
    assert torch.equal(layer.method.dequantize(layer), stacked)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ stacked.T + layer.bias, rtol=1e-4, atol=1e-3)


def test_groups_of_a_configuration_may_hold_one_layer_together() -> None:
    config = integers()
    more = integers(8, 16)["config_groups"]["group_0"] | {"targets": ["re:.*k$"]}
    last = floats("channel")["config_groups"]["group_0"] | {"format": "float-quantized"}
    last["targets"] = ["mlp.v"]
    config["config_groups"] |= {"more": more, "last": last}
    parts = {
        "q": packers.compressed_integers(weight(8, 64)),
        "k": packers.compressed_integers(weight(8, 64), 8, 16),
        "v": packers.fp8(weight(6, 64), "row"),
    }
    layer = load(config, parts)
    stacked = np.concatenate([part.weight for part in parts.values()])
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(stacked))


def test_single_layers_may_have_settings_of_their_own() -> None:
    dynamic = {r"+:.*\.k$": {"bits": 8, "group_size": 16}, r"-:.*\.head": {}}
    parts = {"q": packers.gptq(weight(8, 64)), "k": packers.gptq(weight(8, 64), 8, 16)}
    layer = load(GPTQ | {"dynamic": dynamic}, parts)
    stacked = np.concatenate([part.weight for part in parts.values()])
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(stacked))


def test_zero_points_may_be_bytes() -> None:
    packed = packers.compressed_integers(weight(8, 64), symmetric=False)
    stored = packed.tensors["weight_zero_point"]
    zeros = torch.stack([(stored[o // 8] >> (4 * (o % 8))) & 15 for o in range(8)])
    packed.tensors["weight_zero_point"] = (zeros - 8).to(torch.int8)
    layer = load(integers(symmetric=False), {"only": packed})
    assert torch.equal(layer.method.dequantize(layer), torch.from_numpy(packed.weight))


def test_scales_of_activations_are_read_and_left_unused() -> None:
    packed = packers.fp8(weight(8, 16))
    packed.tensors["input_scale"] = torch.tensor(0.5)
    layer = load(FP8 | {"activation_scheme": "static"}, {"only": packed})
    assert {name for name, _ in layer.named_parameters()} == {"codes", "scales"}
    packed.tensors["input_scale"] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        load(FP8 | {"activation_scheme": "static"}, {"only": packed})


def test_every_code_of_fp8_is_the_number_it_should_be() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127].view(1, -1).view(torch.float8_e4m3fn)
    packed = Packed({"weight": codes, "weight_scale": torch.tensor(0.75)}, codes.float().numpy())
    layer = load(FP8, {"only": packed})
    assert torch.equal(layer.method.dequantize(layer), codes.float() * 0.75)


def test_exponents_can_be_scales() -> None:
    exact = packers.fp8(weight(4, 8), "4x8", "weight_scale_inv")
    codes = exact.tensors["weight"]
    exact.tensors["weight_scale_inv"] = torch.tensor([[124]], dtype=torch.uint8)
    saved = saved_tensors({f"mlp.x.{name}": tensor for name, tensor in exact.tensors.items()})
    saved["mlp.x.weight_scale_inv"] = saved["mlp.x.weight_scale_inv"]._replace(kind="F8_E8M0")
    layer = Linear(8, {"x": 4})
    scheme = scheme_for(fields(FP8 | {"weight_block_size": [4, 8]}))
    assert scheme is not None
    method = scheme.method(["mlp.x"], layer, saved)
    assert method is not None
    layer.use(method)
    for name, place in layer.places("mlp.x"):
        if name in saved:
            assert saved[name].kind in place.kinds
            place.take(saved[name].read())
    assert torch.equal(layer.method.dequantize(layer), codes.float() / 8)


def test_a_layer_without_packed_tensors_is_as_it_is() -> None:
    layer = Linear(64, {"x": 8})
    saved = saved_tensors({"mlp.x.weight": torch.zeros(8, 64)})
    for config in (GPTQ, AWQ, FP8, NF4, integers(), floats("tensor")):
        scheme = scheme_for(fields(config))
        assert scheme is not None
        assert scheme.method(["mlp.x"], layer, saved) is None
    plain = scheme_for(JsonFields({}, "config.json"))
    assert plain.method(["mlp.x"], layer, saved) is None


def test_a_bias_of_zeros_that_packers_add_is_accepted_and_others_are_not() -> None:
    packed = packers.gptq(weight(8, 64))
    packed.tensors["bias"] = torch.zeros(8)
    load(GPTQ, {"only": packed})
    packed.tensors["bias"] = torch.ones(8)
    with pytest.raises(ValueError, match="bias"):
        load(GPTQ, {"only": packed})


def damaged(name: str, value: float) -> Callable[[Packed], None]:
    return lambda packed: packed.tensors[name].view(-1)[3:4].fill_(value)


@pytest.mark.parametrize(
    ("config", "pack", "damage", "message"),
    [
        (GPTQ, packers.gptq, damaged("scales", float("nan")), "not finite"),
        (AWQ, packers.awq, damaged("scales", float("inf")), "not finite"),
        (integers(), packers.compressed_integers, damaged("weight_scale", np.nan), "not finite"),
        (
            floats("channel"),
            lambda w: packers.fp8(w, "row"),
            damaged("weight_scale", np.nan),
            "fin",
        ),
        (FP8, packers.fp8, damaged("weight", float("nan")), "not numbers"),
        (NF4, packers.bitsandbytes, damaged("weight.absmax", np.nan), "not finite"),
        (GPTQ, packers.gptq, damaged("g_idx", 1), "sort the columns"),
        (GPTQ, packers.gptq, damaged("g_idx", -5), "sort the columns"),
        (GPTQ, packers.gptq, damaged("g_idx", 2**31 - 1), "sort the columns"),
    ],
)
def test_values_that_cannot_be_are_refused(
    config: Any, pack: Any, damage: Callable[[Packed], None], message: str
) -> None:
    packed = pack(weight(16, 64))
    damage(packed)
    with pytest.raises(ValueError, match=message):
        load(config, {"only": packed})


def test_a_shape_that_contradicts_the_layer_is_refused() -> None:
    packed = packers.compressed_integers(weight(8, 64))
    packed.tensors["weight_shape"][0] = 9
    with pytest.raises(ValueError, match=r"says \[9, 64\]"):
        load(integers(), {"only": packed})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip"}, "'quip' is not supported. Supported: awq, bitsandbytes"),
        ({}, "quant_method '' is not supported"),
        (GPTQ | {"bits": 3}, r"bits 3 is not supported \(supported: 4, 8\)"),
        (GPTQ | {"bits": 2}, "bits 2 is not supported"),
        (GPTQ | {"bits": 8, "checkpoint_format": "marlin"}, "bits 8 is not supported"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas'"),
        (GPTQ | {"group_size": 0}, "'group_size' is 0"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "is no pattern"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype 'int16'"),
        (AWQ | {"bits": 8}, "bits 8"),
        (AWQ | {"version": "gemv"}, "version 'gemv'"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (AWQ | {"group_size": 48}, "group_size 48"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8 | {"activation_scheme": "odd"}, "activation_scheme 'odd'"),
        (FP8 | {"weight_block_size": [128]}, "must be two sizes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8 is not supported"),
        (compressed("int-quantized", {"num_bits": 8, "type": "int"}), "format 'int-quantized'"),
        (integers(3), "num_bits 3"),
        (integers() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (integers() | {"transform_config": {"config_groups": 1}}, "transform_config"),
        (
            compressed("pack-quantized", integers(), input_activations={"num_bits": 8}),
            "not supported",
        ),
        (floats("group"), "strategy 'group'"),
        (floats("block"), "lacks the field 'block_structure'"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scheme_for(fields(config))


@pytest.mark.parametrize(
    ("config", "pack", "message"),
    [
        (GPTQ | {"group_size": 48}, packers.gptq, "in_features 64 is not a multiple of 48"),
        (AWQ | {"group_size": 128}, packers.awq, "in_features 64 is not a multiple of 128"),
        (integers(group_size=100), packers.compressed_integers, "not a multiple of 100"),
        (
            NF4,
            lambda w: packers.bitsandbytes(w.reshape(32, 32), group_size=64),
            "'shape' is .32, 32., but the layer is .16, 64.",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_layer(
    config: Any, pack: Any, message: str
) -> None:
    packed = Packed(pack(weight(16, 64)).tensors, weight(16, 64))
    with pytest.raises(ModelError, match=message):
        load(config, {"only": packed})


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("weight.quant_state.bitsandbytes__nf4", b"{", "is not valid JSON"),
        ("weight.quant_state.bitsandbytes__nf4", b"[]", "holds list, but must hold an object"),
        ("weight.quant_state.bitsandbytes__nf4", b"{}", "lacks the field 'shape'"),
        ("weight.quant_map", b"123", "quant_map must be there, with 16 numbers"),
    ],
)
def test_a_damaged_description_is_refused_with_its_name(
    suffix: str, value: bytes, message: str
) -> None:
    packed = packers.bitsandbytes(weight(4, 64))
    packed.tensors[suffix] = torch.tensor(list(value), dtype=torch.uint8)
    with pytest.raises(ModelError, match=message) as refused:
        load(NF4, {"only": packed})
    assert "mlp.only.weight.quant_" in str(refused.value)
