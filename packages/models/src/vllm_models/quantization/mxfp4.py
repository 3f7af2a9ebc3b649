"""MXFP4 checkpoints: 4-bit floats (e2m1), of which 32 share an exponent.

Held as the blocks of a GGUF file, which have the same numbers in another order: a checkpoint has
neighbours in the two halves of a byte, a block has numbers that are 16 apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.gguf.types import GgmlType
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.blocks import Blocks
from vllm_models.quantization.parts import Part

_GROUP = 32
_BYTES = frozenset({"U8"})


class Mxfp4(Blocks):
    """Every part as MXFP4 blocks."""

    def __init__(self) -> None:
        super().__init__({})

    def __eq__(self, other: object) -> bool:
        """One can hold all parts of a layer."""
        return isinstance(other, Mxfp4)

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def create(self, layer: Linear) -> None:
        """All parts have one type."""
        self.kinds = dict.fromkeys(layer.parts, GgmlType.MXFP4)
        super().create(layer)

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """blocks [O, K / 32, 16] of two numbers each, and scales [O, K / 32]."""
        num_groups = layer.in_features // _GROUP
        shape = (layer.parts[part], num_groups)

        def held() -> Tensor:  # [O, K / 32, 17]: the exponent stands first
            return self.held(layer, part).view(*shape, -1)

        return {
            "blocks": Place((*shape, 16), _BYTES, lambda t: held()[..., 1:].copy_(_regroup(t))),
            "scales": Place(shape, _BYTES, lambda t: held()[..., 0].copy_(t)),
        }


def _regroup(stored: Tensor) -> Tensor:
    """Halves of bytes from (0, 1), (2, 3), ... to (0, 16), (1, 17), ...: [..., 16] -> [..., 16]."""
    codes = torch.stack((stored & 15, stored >> 4), -1).flatten(-2)  # [..., 32]
    low, high = codes.chunk(2, dim=-1)
    return low | high << 4


class Mxfp4Format:
    """Implements `Format` for the experts that gpt-oss is published with."""

    @classmethod
    def from_fields(cls, fields: JsonFields) -> Mxfp4Format:
        """There is nothing to choose."""
        return cls()

    def method(self, part: Part) -> LinearMethod | None:
        """MXFP4 where there are blocks."""
        if not part.has("blocks"):
            return None
        part.check_multiple("in_features", part.in_features, _GROUP, "the size of a group")
        return Mxfp4()
