"""Keys or values of one layer, as they are stored: numbers, or eight bits beside scales.

A scale belongs to one position and head, and makes the largest number of its head the largest that
eight bits have:

    scale = max |x| / (127 of int8, or 448 of float8_e4m3fn),   stored = x / scale
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_SMALLEST = 1e-36  # of a scale: the inverse of a smaller one may be no number


class KVSide(NamedTuple):
    """The keys or the values of all blocks of a layer.

    Attributes:
        data: [B, P, K, D] where torch computes, [B, K, P, D] where Triton does, or in the order of
            the CPU's kernels; of the compute type, or int8 or float8_e4m3fn with scales.
        scales: float32, [B, P, K] or [B, K, P]: multiplies the numbers of a position and head; None
            if the data are the numbers.
    """

    data: Tensor
    scales: Tensor | None = None

    def of(self, layer: int) -> KVSide:
        """One layer of the sides of several."""
        return KVSide(self.data[layer], None if self.scales is None else self.scales[layer])

    def dequantized(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Some blocks as numbers: [N, P, K, D].

        Args:
            blocks: [N].
            dtype: Of the result, unless the numbers are stored as they are.
        """
        found = self.data.index_select(0, blocks)
        if self.scales is None:
            return found
        return found.float().mul_(self.scales.index_select(0, blocks)[..., None]).to(dtype)

    def put(self, slots: Tensor, heads: Tensor) -> None:
        """Store heads [T, K, D] at the positions `slots` [T], block * P + offset, where torch
        computes.
        """
        if self.scales is None:
            self.data.flatten(0, 1).index_copy_(0, slots, heads)
            return
        data, scales = quantize(heads, self.data.dtype)
        self.data.flatten(0, 1).index_copy_(0, slots, data)
        self.scales.flatten(0, 1).index_copy_(0, slots, scales)


def quantize(heads: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads [..., D] in eight bits, and their scales float32 [...].

    A head with a number that is not finite keeps it in its scale.
    """
    numbers = heads.float()
    scales = numbers.abs().amax(-1) / LARGEST[dtype]
    is_usable = (scales > _SMALLEST) & scales.isfinite()
    inverse = torch.where(is_usable, 1 / scales, 0.0)[..., None]
    stored = torch.where(inverse > 0, numbers * inverse, 0.0)
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scales
