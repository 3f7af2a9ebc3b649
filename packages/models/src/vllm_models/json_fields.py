"""Typed reads of a JSON object from a checkpoint; every error names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from vllm_traits import ModelError

T = TypeVar("T")
_MAX_BYTES = 64 << 20
_EXACT = 1 << 53  # integers below it are numbers too
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


class JsonFields:
    """A JSON object and where it came from.

    Args:
        values: The parsed object.
        source: File and path inside it, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    @classmethod
    def read(cls, path: Path) -> JsonFields:
        """Parse a file that holds one object.

        Raises:
            ModelError: It is absent, not JSON, or not an object.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ModelError(f"{path} is larger than {_MAX_BYTES} bytes; is it really JSON?")
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path} holds {type(values).__name__}, but must hold an object.")
        return cls(values, str(path))

    def get(self, name: str, kind: type[T], default: T) -> T:
        """The field as `kind`, or `default` if it is absent or null."""
        value = self.values.get(name)
        return default if value is None else self._typed(name, value, kind)

    def need(self, name: str, kind: type[T]) -> T:
        """The field as `kind`; it must be there."""
        value = self.values.get(name)
        if value is None:
            raise ModelError(f"{self.source} lacks the field {name!r}.")
        return self._typed(name, value, kind)

    def positive(self, name: str, default: int | None = None) -> int:
        """The field as an integer of at least 1."""
        value = self.need(name, int) if default is None else self.get(name, int, default)
        if value < 1:
            raise ModelError(f"{self.source}: {name!r} is {value}, but must be at least 1.")
        return value

    def above_zero(self, name: str, default: float) -> float:
        """The field as a number greater than 0."""
        value = self.get(name, float, default)
        if value <= 0:
            raise ModelError(f"{self.source}: {name!r} is {value}, but must be greater than 0.")
        return value

    def child(self, name: str) -> JsonFields | None:
        """The object under `name`, or None if it is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ModelError(f"{self.source}: {name!r} is {value!r}, but must be an object.")
        return JsonFields(value, f"{self.source}: {name}")

    def ids(self, name: str) -> frozenset[int]:
        """Token ids given as one integer, a list of them, or not at all."""
        value = self.values.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        return frozenset(self._typed(name, item, int) for item in values)

    def _typed(self, name: str, value: Any, kind: type[T]) -> T:
        if kind is float and type(value) is int and abs(value) < _EXACT:
            value = float(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            wanted = _NAMES.get(kind, kind.__name__)
            raise ModelError(f"{self.source}: {name!r} is {value!r}, but must be {wanted}.")
        return value
