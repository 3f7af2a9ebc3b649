"""A layer whose parts are held each in their own way, such as queries packed and values plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from vllm_models.components.linear import Linear, LinearMethod, Packed, Place

_ABSENT = object()


class _PartAlone:
    """One part of a layer, seen as a layer of its own.

    Its parameters are the layer's, whose names begin with the part's, so that the loader gives
    them memory and counts them like all others.
    """

    def __init__(self, layer: Linear, part: str) -> None:
        alone = {
            "in_features": layer.in_features,
            "out_features": layer.parts[part],
            "parts": {"": layer.parts[part]},
            "bias": None if layer.bias is None else layer.bias[layer.rows(part)],
            "_layer": layer,
            "_prefix": f"{part}_",
        }
        self.__dict__.update(alone)

    def rows(self, _: str) -> slice:
        """All of them."""
        return slice(0, self.out_features)

    def keep_packed(self, packed: Packed) -> None:
        """Multiply with the CPU's kernels from now on."""
        self.packed = packed

    @property
    def whole(self) -> Linear:
        """The layer that this is a part of."""
        return self._layer

    @property
    def fixed_order(self) -> bool:
        """As the layer's."""
        return self._layer.fixed_order

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._layer, self._prefix + name, _ABSENT)
        if found is _ABSENT and name != "packed":
            raise AttributeError(name)
        return None if found is _ABSENT else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer, self._prefix + name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._layer, self._prefix + name)


class Separate(LinearMethod):
    """A method for each part.

    Args:
        methods: By name of the part.
    """

    def __init__(self, methods: Mapping[str, LinearMethod]) -> None:
        self.methods = methods

    def create(self, layer: Linear) -> None:
        """Parameters of every part, named after it."""
        for part, method in self.methods.items():
            method.create(_alone(layer, part))

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """Those of the part's own method."""
        return self.methods[part].places(_alone(layer, part), "")

    def pack(self, layer: Linear) -> None:
        """Every part."""
        for part, method in self.methods.items():
            method.pack(_alone(layer, part))

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """The parts' products side by side."""
        products: list[Tensor] = []
        for part, method in self.methods.items():
            own = None if bias is None else bias[layer.rows(part)]
            products.append(method.apply(_alone(layer, part), x, own))
        return torch.cat(products, dim=-1)

    def packed_parts(self, layer: Linear) -> list[Packed | None]:
        """Of every part."""
        parts = (m.packed_parts(_alone(layer, part)) for part, m in self.methods.items())
        return [packed for some in parts for packed in some]

    def dequantize(self, layer: Linear) -> Tensor:
        """The parts above one another."""
        return torch.cat([m.dequantize(_alone(layer, part)) for part, m in self.methods.items()])


def _alone(layer: Linear, part: str) -> Linear:
    return cast(Linear, _PartAlone(layer, part))
