"""Typed reads of a GGUF file's metadata under its architecture's prefix; errors name file and key.

Knows nothing of Hugging Face names.
"""

from __future__ import annotations

import math
from typing import TypeVar

from vllm_traits import ModelError

from vllm_models.gguf.header import GgufHeader

T = TypeVar("T", int, float, str, bool)
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
# No model is near these; a file that claims more would take all memory before its shapes are seen.
_LARGEST = 1 << 28
_LIMITS = {
    ".block_count": 1000,
    ".expert_count": 1024,
    ".attention.head_count": 1 << 16,
    ".attention.head_count_kv": 1 << 16,
    ".attention.key_length": 1 << 16,
    ".attention.value_length": 1 << 16,
}


class Metadata:
    """Values of one file.

    Args:
        header: Of the file.

    Raises:
        ModelError: It does not name its architecture.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.source = str(header.paths[0])
        self._prefix = ""
        self._prefix = f"{self.need('general.architecture', str)}."

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        return self._prefix[:-1]

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value as `kind`, or `default` if it is absent.

        Args:
            key: Whole, or without the architecture if it starts with a dot.
            kind: Of the value; an integer passes as a float.
            default: Taken if there is none.
        """
        found = self.find(key, kind)
        return default if found is None else found

    def need(self, key: str, kind: type[T]) -> T:
        """The value as `kind`; it must be there."""
        found = self.find(key, kind)
        if found is None:
            raise ModelError(f"{self.source} lacks the key {self.full(key)!r}.")
        return found

    def find(self, key: str, kind: type[T]) -> T | None:
        """The value as `kind`, or None if it is absent."""
        value = self.header.metadata.get(self.full(key))
        return None if value is None else self._typed(key, value, kind)

    def positive(self, key: str, default: int | None = None) -> int:
        """The value as an integer of at least 1 and of a size that a model can have."""
        value = self.need(key, int) if default is None else self.get(key, int, default)
        return self._sized(key, value)

    def per_layer(self, key: str, kind: type[T], default: T | None = None) -> list[T]:
        """A value for each layer; GGUF has one for all, or an array."""
        value = self.header.metadata.get(self.full(key), default)
        count = self.num_layers
        if not isinstance(value, list):
            if value is None:
                raise ModelError(f"{self.source} lacks the key {self.full(key)!r}.")
            return [self._typed(key, value, kind)] * count
        if len(value) < count:
            raise self.error(key, f"has {len(value)} entries, but there are {count} layers")
        return [self._typed(key, item, kind) for item in value[:count]]

    def largest(self, key: str, default: int | None = None) -> int:
        """The greatest of the values of all layers, a positive integer."""
        return self._sized(key, max(self.per_layer(key, int, default)))

    def same(self, key: str, default: int | None = None) -> int:
        """A positive integer that may be given for each layer, but is the same in all."""
        values = set(self.per_layer(key, int, default))
        if len(values) != 1:
            raise self.error(key, f"is {sorted(values)[:8]}, but must be one positive integer")
        return self._sized(key, values.pop())

    @property
    def num_layers(self) -> int:
        """How many layers the file has, those for drafting several tokens included."""
        return self.positive(".block_count")

    def has(self, stem: str, layer: int = 0) -> bool:
        """Whether a layer has a tensor, given with its suffix."""
        return f"blk.{layer}.{stem}" in self.header.tensors

    def full(self, key: str) -> str:
        """The whole key."""
        return self._prefix[:-1] + key if key.startswith(".") else key

    def error(self, key: str, fault: str) -> ModelError:
        """What is wrong with a value."""
        return ModelError(f"{self.source}: {self.full(key)!r} {fault}.")

    def _sized(self, key: str, value: int) -> int:
        limit = _LIMITS.get(key, _LARGEST)
        if not 1 <= value <= limit:
            raise self.error(key, f"is {value}, but must be 1 to {limit}")
        return value

    def _typed(self, key: str, value: object, kind: type[T]) -> T:
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = float(value)
        is_number = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kind) or type(value) is not kind or not is_number:
            shown = "an array" if isinstance(value, list) else repr(value)[:80]
            raise self.error(key, f"is {shown}, but must be {_NAMES[kind]}")
        return value
