"""Whether results depend on the batch, read off the layers of a loaded model.

Kernels in C sum in an order that nothing but the shape of the weight decides; torch chooses by the
number of rows. Says what is known beforehand; whether it holds is for a run to show.
"""

from __future__ import annotations

import torch
from torch import nn

from vllm_models.components.linear import Linear
from vllm_models.gpu.launch import serves
from vllm_models.native.attention import LANES
from vllm_models.native.library import library
from vllm_models.runner.kv import KVPool


def batch_dependence(model: nn.Module, kv: KVPool) -> tuple[str, ...]:
    """Why results may depend on the batch, in half sentences; nothing if they never do.

    Args:
        model: With its weights.
        kv: Its pool.
    """
    if serves(kv.device):
        return _on_gpu(model)
    if kv.device.type != "cpu":
        return (f"torch computes on {kv.device.type}, in an order that follows from the shapes",)
    if library() is None:
        return ("torch computes, because there are no native kernels",)
    return (*_products(model), *_attention(kv))


def fix_orders(model: nn.Module) -> None:
    """Let products of the GPU sum in an order that nothing but the weight's shape decides."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.fixed_order = True


def _on_gpu(model: nn.Module) -> tuple[str, ...]:
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    free = sum(not layer.fixed_order for layer in layers)
    return (f"{free} of {len(layers)} products sum in the fastest order",) if free else ()


def _products(model: nn.Module) -> tuple[str, ...]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
    others = [n for n, layer in layers.items() if None in layer.method.packed_parts(layer)]
    if not others:
        return ()
    first = layers[others[0]]
    how, dtype = type(first.method).__name__, _name(next(first.parameters()).dtype)
    return (
        f"{len(others)} of {len(layers)} products run in torch, the first of them {others[0]} "
        f"({how} in {dtype}, {first.in_features} to {first.out_features})",
    )


def _attention(kv: KVPool) -> tuple[str, ...]:
    if kv.layout == "native":
        return ()
    return (
        f"attention runs in torch: KV is {_name(kv.dtype)} in blocks of {kv.block_size}, and the "
        f"kernels take bfloat16 or float32, blocks of a multiple of {LANES}, and values of their "
        f"own with heads of a multiple of {LANES}",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
