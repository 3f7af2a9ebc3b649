"""A product with a weight that is dequantized a few rows at a time, so that memory stays small.

Correct for every format on every device; what is faster is somebody else's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_models.components.linear import Linear, LinearMethod

_TILE_ELEMENTS = 1 << 20  # 4 MiB of float32


class Tiled(LinearMethod):
    """A weight of which some rows can be had as numbers."""

    @abstractmethod
    def tile(self, layer: Linear, rows: slice) -> Tensor:
        """Some rows in the order in which their columns are held: [n, K] float32."""

    def segments(self, layer: Linear) -> Iterator[tuple[slice, Tensor | None]]:
        """Rows whose columns are held in one order, and that order: held [k] is of column
        order[k]; None is as they come.
        """
        yield slice(0, layer.out_features), None

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, K] -> [T, O] in the element type of x, by the device's kernels if packed for them."""
        if layer.packed is not None:
            return layer.packed.matmul(x, bias).to(x.dtype)
        out = x.new_empty(len(x), layer.out_features)
        for rows, order in self.segments(layer):
            ordered = x if order is None else x[:, order]
            for some in _tiles(rows, layer.in_features):
                tile = self.tile(layer, some).to(x.dtype)
                out[:, some] = F.linear(ordered, tile, None if bias is None else bias[some])
        return out

    def dequantize(self, layer: Linear) -> Tensor:
        """[O, K] float32, columns as in the checkpoint."""
        if layer.packed is not None:
            return layer.packed.dequantize()
        parts: list[Tensor] = []
        for rows, order in self.segments(layer):
            held = self.tile(layer, rows)
            parts.append(held if order is None else held[:, order.argsort()])
        return torch.cat(parts)

    def gather(self, layer: Linear, rows: Tensor) -> Tensor:
        """Some rows: [T] -> [T, K] float32."""
        if layer.packed is not None:
            return layer.packed.gather(rows)
        return super().gather(layer, rows)


def _tiles(rows: slice, columns: int) -> Iterator[slice]:
    step = max(1, _TILE_ELEMENTS // columns)
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))
