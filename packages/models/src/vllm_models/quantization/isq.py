"""Quantize plain weights while they are loaded; which type each gets is said by the mixture.

A weight is quantized straight to its place when it arrives, so that no layer is ever there twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor
from vllm_traits import ModelError

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.gguf.mixture import (
    Shape,
    choose_type,
    falls_back,
    find_isq,
    shape_of,
)
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.quantization.blocks import Blocks, blocks_or_plain
from vllm_models.weights.saved import PLAIN_KINDS, SavedTensor

_LOG = logging.getLogger(__name__)
_NO_WEIGHTS = frozenset({"BOOL", "I64"})  # buffers that some checkpoints carry


class QuantizingBlocks(Blocks):
    """Blocks that are made of plain numbers."""

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """Some rows of one parameter, whose numbers are quantized when they arrive."""
        shape, kind = (layer.parts[part], layer.in_features), self.kinds[part]

        def take(weight: Tensor) -> None:
            held = self.held(layer, part)
            quantize(weight.to(held.device), kind, held)

        return {"weight": Place(shape, PLAIN_KINDS, take)}


class IsqScheme:
    """Implements `Scheme`: every matrix but the routers of experts becomes blocks.

    Args:
        name: Of a mixture, as `find_isq` knows it.

    Raises:
        ConfigError: There is no such mixture.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._mixture = find_isq(name)
        self._shape: Shape | None = None

    def method(
        self, names: Sequence[str], layer: Linear, saved: Mapping[str, SavedTensor]
    ) -> LinearMethod | None:
        """Blocks for all parts that have a type.

        Raises:
            ModelError: The checkpoint is quantized already.
        """
        if self._shape is None:
            self._check(saved)
            self._shape = shape_of(saved)
            self._warn(saved, self._shape)
        kinds = {
            part: choose_type(self._mixture, name, layer.in_features, self._shape)
            for part, name in zip(layer.parts, names, strict=True)
        }
        return blocks_or_plain(kinds, QuantizingBlocks)

    def _check(self, saved: Mapping[str, SavedTensor]) -> None:
        for tensor in saved.values():
            if tensor.kind not in PLAIN_KINDS | _NO_WEIGHTS:
                raise ModelError(
                    f"{tensor.source}: {tensor.name} is {tensor.kind}, so the model is quantized "
                    f"already and --isq {self._name} cannot be used. Leave it out, or load the "
                    "model's original weights."
                )

    def _warn(self, saved: Mapping[str, SavedTensor], shape: Shape) -> None:
        matrices = {
            name.removesuffix(".weight"): tensor.shape[1]
            for name, tensor in saved.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        }
        fallen = [
            columns
            for name, columns in matrices.items()
            if falls_back(self._mixture, name, columns, shape)
        ]
        if fallen:
            _LOG.warning(
                "%d weights have rows of %s, which %s does not hold: they get Q8_0 where 32 "
                "divides the row, else they stay as they are.",
                len(fallen),
                ", ".join(str(columns) for columns in sorted(set(fallen))),
                self._mixture.most.name,
            )
