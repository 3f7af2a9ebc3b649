"""Checkpoints of every format, and layers that are loaded from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm_models.components.linear import Linear
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.scheme import scheme_for
from vllm_models.weights.saved import SavedTensor

from tests.models.quantization import packers
from tests.models.quantization.packers import Packed

KINDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def compressed(form: str, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights)} | more
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


def integers(bits: int = 4, group_size: int = 32, symmetric: bool = True) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group"}
    size = {} if group_size == -1 else {"group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric} | strategy | size
    return compressed("pack-quantized", weights)


def floats(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | more
    return compressed("float-quantized", weights)


def weight(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def saved_tensors(tensors: Mapping[str, Tensor]) -> dict[str, SavedTensor]:
    return {
        name: SavedTensor(
            name,
            tuple(tensor.shape),
            KINDS[tensor.dtype],
            "model.safetensors",
            tensor.nbytes,
            lambda tensor=tensor: tensor,
            lambda: None,
        )
        for name, tensor in tensors.items()
    }


def fields(config: Mapping[str, Any]) -> JsonFields:
    return JsonFields({"quantization_config": config}, "config.json")


def load(config: Mapping[str, Any], parts: Mapping[str, Packed], bias: bool = False) -> Linear:
    """A layer of several parts, filled as a loader does."""
    columns = next(iter(parts.values())).weight.shape[1]
    layer = Linear(columns, {name: len(part.weight) for name, part in parts.items()}, bias)
    tensors = {
        f"mlp.{name}.{suffix}": tensor
        for name, part in parts.items()
        for suffix, tensor in part.tensors.items()
    }
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(len(layer.bias)))
    saved = saved_tensors(tensors)
    scheme = scheme_for(fields(config))
    assert scheme is not None
    method = scheme.method([f"mlp.{name}" for name in parts], layer, saved)
    assert method is not None
    layer.use(method)
    places = dict(layer.places("mlp.x"))
    for name, tensor in saved.items():
        place = places.pop(name)
        assert tensor.shape == place.shape, name
        assert tensor.kind in place.kinds, name
        place.take(tensor.read())
    left = [name for name, place in places.items() if not place.optional and "bias" not in name]
    assert not left
    layer.method.pack(layer)
    return layer


Case = tuple[dict[str, Any], Callable[[np.ndarray], Packed], tuple[int, int]]
CASES: dict[str, Case] = {
    "gptq": (GPTQ, packers.gptq, (24, 64)),
    "gptq row": (GPTQ | {"group_size": -1}, lambda w: packers.gptq(w, group_size=-1), (8, 40)),
    "gptq v2": (
        GPTQ | {"checkpoint_format": "gptq_v2"},
        lambda w: packers.gptq(w, version=2),
        (16, 64),
    ),
    "gptq 8 bit": (GPTQ | {"bits": 8}, lambda w: packers.gptq(w, bits=8), (12, 64)),
    "gptq symmetric": (GPTQ | {"sym": True}, lambda w: packers.gptq(w, symmetric=True), (8, 64)),
    "gptq desc_act": (
        GPTQ | {"desc_act": True},
        lambda w: packers.gptq(w, order_seed=1),
        (16, 96),
    ),
    "gptq 8 bit desc_act": (
        GPTQ | {"desc_act": True, "bits": 8, "group_size": 16},
        lambda w: packers.gptq(w, bits=8, group_size=16, order_seed=1),
        (8, 64),
    ),
    "marlin": (
        GPTQ | {"checkpoint_format": "marlin", "group_size": 128},
        packers.marlin,
        (128, 256),
    ),
    "marlin row": (
        GPTQ | {"is_marlin_format": True, "group_size": -1},
        lambda w: packers.marlin(w, -1),
        (64, 128),
    ),
    "awq": (AWQ, packers.awq, (24, 64)),
    "awq 64": (AWQ | {"group_size": 64}, lambda w: packers.awq(w, 64), (8, 128)),
    "ints": (integers(), packers.compressed_integers, (9, 64)),
    "ints row": (
        integers(group_size=-1),
        lambda w: packers.compressed_integers(w, group_size=-1),
        (6, 40),
    ),
    "ints 8": (integers(8), lambda w: packers.compressed_integers(w, 8), (5, 64)),
    "ints zeros": (
        integers(symmetric=False),
        lambda w: packers.compressed_integers(w, symmetric=False),
        (13, 64),
    ),
    "ints 8 zeros": (
        integers(8, symmetric=False),
        lambda w: packers.compressed_integers(w, 8, symmetric=False),
        (7, 64),
    ),
    "ints ordered": (
        integers(symmetric=False),
        lambda w: packers.compressed_integers(w, order_seed=3, symmetric=False),
        (8, 96),
    ),
    "fp8": (FP8, packers.fp8, (10, 33)),
    "fp8 row": (FP8, lambda w: packers.fp8(w, "row"), (10, 33)),
    "fp8 blocks": (
        FP8 | {"weight_block_size": [128, 128]},
        lambda w: packers.fp8(w, "128x128", "weight_scale_inv"),
        (200, 300),
    ),
    "fp8 odd blocks": (
        FP8 | {"weight_block_size": [8, 16]},
        lambda w: packers.fp8(w, "8x16", "weight_scale_inv"),
        (20, 40),
    ),
    "fp8 one huge block": (
        FP8 | {"weight_block_size": [1 << 50, 1 << 50]},
        lambda w: packers.fp8(w, f"{1 << 50}x{1 << 50}", "weight_scale_inv"),
        (20, 40),
    ),
    "floats": (floats("tensor"), packers.fp8, (10, 33)),
    "floats row": (floats("channel"), lambda w: packers.fp8(w, "row"), (10, 33)),
    "floats blocks": (
        floats("block", block_structure=[16, 32]),
        lambda w: packers.fp8(w, "16x32"),
        (40, 70),
    ),
    "nf4": (NF4, packers.bitsandbytes, (6, 128)),
    "nf4 nested": (NF4, lambda w: packers.bitsandbytes(w, nested=True), (270, 64)),
}
