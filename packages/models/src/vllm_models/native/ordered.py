"""Quantized weights that hold their columns in another order than x has them.

A product sorts the columns of x first: one copy of x for each order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.native.blocks import PackedBlocks


class Sorted(NamedTuple):
    """Some outputs of a layer.

    Attributes:
        packed: Their weight.
        order: int64 [columns]; held column k is column order[k] of x. None is as they come.
    """

    packed: PackedBlocks
    order: Tensor | None


class OrderedBlocks:
    """Weights with the same columns, each in an order of its own; results stand side by side.

    Attributes:
        weights: As given.
        outputs: Rows of all weights.
        columns: Width of x.
    """

    def __init__(self, weights: Sequence[Sorted]) -> None:
        self.weights = tuple(weights)
        self.outputs = sum(weight.packed.outputs for weight in weights)
        self.columns = weights[0].packed.columns

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `PackedWeight.matmul`: [M, columns] -> [M, outputs]."""
        if out is None:
            found = dtype or (x.dtype if x.dtype == torch.bfloat16 else torch.float32)
            out = torch.empty((len(x), self.outputs), dtype=found)
        first = 0
        for packed, order in self.weights:
            rows = slice(first, first + packed.outputs)
            held = x if order is None else x.index_select(1, order)
            packed.matmul(held, None if bias is None else bias[rows], out=out[:, rows])
            first += packed.outputs
        return out

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight as numbers: [T] int64 -> [T, columns] float32."""
        return self.dequantize()[rows]

    def dequantize(self) -> Tensor:
        """The weights as numbers: [outputs, columns] float32, columns as x has them."""
        return torch.cat(
            [
                packed.dequantize() if order is None else packed.dequantize()[:, order.argsort()]
                for packed, order in self.weights
            ]
        )
