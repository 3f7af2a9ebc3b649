"""One layer of a checkpoint as the formats see it, and the formats' common questions about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from vllm_traits import ModelError

from vllm_models.components.linear import LinearMethod
from vllm_models.json_fields import JsonFields
from vllm_models.weights.saved import SavedTensor


class Part(NamedTuple):
    """A linear layer as the checkpoint has it; several may be one `Linear` of ours.

    Attributes:
        name: Without suffix, such as "model.layers.0.mlp.up_proj".
        out_features: Rows of its weight.
        in_features: Columns.
        saved: The whole checkpoint.
    """

    name: str
    out_features: int
    in_features: int
    saved: Mapping[str, SavedTensor]

    def find(self, suffix: str) -> SavedTensor | None:
        """One tensor of the layer; checkpoints of embedding models leave out "model."."""
        name = f"{self.name}.{suffix}"
        return self.saved.get(name) or self.saved.get(name.removeprefix("model."))

    def has(self, *suffixes: str) -> bool:
        """Whether any of them is there."""
        return any(self.find(suffix) is not None for suffix in suffixes)

    def kind(self, suffix: str) -> str:
        """Type of one tensor, "" if it is not there."""
        found = self.find(suffix)
        return "" if found is None else found.kind

    def scale_dtype(self, suffix: str) -> torch.dtype:
        """In which scales are held: half floats as they are, others in float32."""
        return torch.float16 if self.kind(suffix) == "F16" else torch.float32

    def group_size(self, wanted: int) -> int:
        """Columns of a group, where -1 is all of them.

        Raises:
            ModelError: They do not divide the columns.
        """
        size = self.in_features if wanted == -1 else wanted
        self.check_multiple("in_features", self.in_features, size, "its group_size")
        return size

    def check_multiple(self, what: str, value: int, divisor: int, why: str) -> None:
        """Raise a ModelError unless the divisor divides the value."""
        if divisor < 1 or value % divisor:
            raise ModelError(f"{self.name}: {what} {value} is not a multiple of {divisor}, {why}.")


class Format(Protocol):
    """A way in which checkpoints hold some of their linear layers."""

    def method(self, part: Part) -> LinearMethod | None:
        """How a layer is held; None is as it is. Methods that compare equal can share a `Linear`.

        Raises:
            ModelError: It is held in a way that is not supported.
        """
        ...


def one_of(fields: JsonFields, name: str, value: object, supported: tuple[object, ...]) -> None:
    """Raise a ModelError unless the value of a field is supported."""
    if value not in supported:
        listed = ", ".join(str(known) for known in supported)
        raise ModelError(
            f"{fields.source}: {name} {value!r} is not supported (supported: {listed})."
        )
