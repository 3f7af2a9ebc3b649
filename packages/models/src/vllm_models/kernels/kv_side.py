"""Keys or values of one layer, as they are stored."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
