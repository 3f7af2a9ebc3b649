"""How close a loaded model's kernels come to the memory's limit, measured in some milliseconds.

A product with one row reads every weight once, so the share of the read bandwidth is its score.
Weights that fit into the processor's caches may score above 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from vllm_models.components.linear import Linear
from vllm_models.native.blocks import PackedBlocks
from vllm_models.native.dense import PackedDense
from vllm_models.native.library import Library, library
from vllm_models.native.packed import zeros

_MEMORY = 256 << 20  # bytes; more than caches hold
_ROUNDS = 5
_SECONDS = 0.5  # for the rounds of one measurement; one round always ends
_KERNELS: dict[type, str] = {PackedDense: "dense", PackedBlocks: "blocks"}


class KernelSpeed(NamedTuple):
    """What was measured.

    Attributes:
        read_bandwidth: Bytes/s.
        shares: Of it, by kernel: `dense` or `blocks`, all of the model's weights in turn.
    """

    read_bandwidth: float
    shares: Mapping[str, float]


@torch.inference_mode()
def measure_kernels(model: nn.Module) -> KernelSpeed | None:
    """Read memory, then multiply one row by every packed weight; None without native kernels.

    Args:
        model: With its weights, on the CPU.
    """
    found = library()
    if found is None:
        return None
    read = _read_bandwidth(found)
    shares: dict[str, float] = {}
    for kernel, weights in _packed(model).items():
        inputs = {width: torch.randn(1, width) for width in {w.columns for w in weights}}
        products = lambda weights=weights, x=inputs: [w.matmul(x[w.columns]) for w in weights]  # noqa: E731
        num_bytes = sum(weight.nbytes for weight in weights)
        shares[kernel] = num_bytes / _seconds(products) / read
    return KernelSpeed(read, shares)


def _read_bandwidth(found: Library) -> float:
    memory = zeros(_MEMORY).fill_(1)
    return _MEMORY / _seconds(lambda: found.read_memory(memory.data_ptr(), _MEMORY))


def _packed(model: nn.Module) -> dict[str, list[PackedDense | PackedBlocks]]:
    """Packed weights by the name of their kernel, in the order of the model."""
    weights: dict[str, list[PackedDense | PackedBlocks]] = {}
    layers = (module for module in model.modules() if isinstance(module, Linear))
    for packed in (part for layer in layers for part in layer.method.packed_parts(layer)):
        if isinstance(packed, PackedDense | PackedBlocks):
            weights.setdefault(_KERNELS[type(packed)], []).append(packed)
    return weights


def _seconds(run: Callable[[], object]) -> float:
    """The median of a few rounds, after one that does not count."""
    begin = time.perf_counter()
    run()
    times: list[float] = []
    while not times or (len(times) < _ROUNDS and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)
