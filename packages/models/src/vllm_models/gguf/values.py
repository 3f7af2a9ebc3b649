"""Bounded reads of a GGUF file: numbers, strings and metadata values.

Every length is compared with what is left of the file before anything is read or allocated. What
the keys mean is not known here.
"""

from __future__ import annotations

import os
import struct
from io import BufferedIOBase
from pathlib import Path
from typing import TypeAlias

from vllm_traits import ModelError

from vllm_models.gguf.types import NUMBER_CODES, ValueType

Value: TypeAlias = "int | float | bool | str | list[Value]"

MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 1 << 24
MAX_ARRAY_ITEMS = 1 << 23  # of all arrays of a file together
MAX_NESTING = 4
_WINDOW_BYTES = 1 << 18
_U64 = struct.Struct("<Q")
_NO_NUMBER_BYTES = {ValueType.STRING: 8, ValueType.ARRAY: 12}  # of the shortest one


class BoundedFile:
    """A little-endian GGUF file that is read from front to back.

    Args:
        path: For messages.
        file: Open at its beginning.
    """

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self._file = file
        self._window = b""  # bytes [_start, _start + len) of the file; _at is inside
        self._start = self._at = 0
        self._items_left = MAX_ARRAY_ITEMS

    @property
    def position(self) -> int:
        """Where the next read begins, in bytes."""
        return self._start + self._at

    def damaged(self, fault: str) -> ModelError:
        """A refusal of this file."""
        return ModelError(
            f"{self.path} is not a valid GGUF file: {fault}. It is damaged or incomplete; download "
            "or convert it again."
        )

    def require(self, num_bytes: int, what: str) -> None:
        """Refuse a file that ends too early.

        Raises:
            ModelError: Less than `num_bytes` are left for `what`.
        """
        left = self.size - self.position
        if num_bytes > left:
            raise self.damaged(f"{what} needs {num_bytes} bytes, but only {left} are left")

    def take(self, num_bytes: int, what: str) -> bytes:
        """The next bytes.

        Args:
            num_bytes: How many; memory is used for no more than the file has.
            what: Named if they are not there.
        """
        if num_bytes > len(self._window) - self._at:
            self.require(num_bytes, what)
            rest = self._window[self._at :]
            self._start, self._at = self.position, 0
            self._window = rest + self._file.read(max(num_bytes - len(rest), _WINDOW_BYTES))
            if len(self._window) < num_bytes:
                raise self.damaged(f"it became shorter while {what} was read")
        first = self._at
        self._at += num_bytes
        return self._window[first : self._at]

    def u32(self, what: str) -> int:
        """The next unsigned integer of 4 bytes."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """The next unsigned integer of 8 bytes."""
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str, max_bytes: int, *, strict: bool = True) -> str:
        """The next string.

        Args:
            what: Named in messages.
            max_bytes: A longer one is refused.
            strict: Whether to refuse bytes that are not UTF-8; else they become lone surrogates,
                which `encode("utf-8", "surrogateescape")` turns back into the same bytes.
        """
        num_bytes = self.u64(f"the length of {what}")
        if num_bytes > max_bytes:
            raise self.damaged(f"{what} has {num_bytes} bytes, over the limit of {max_bytes}")
        found = self.take(num_bytes, what)
        try:
            return found.decode("utf-8", "strict" if strict else "surrogateescape")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8 at byte {error.start}") from error

    def value(self, what: str) -> tuple[ValueType, Value]:
        """The next metadata value after its type."""
        kind = self._kind(what)
        return kind, self._value(kind, what, 0)

    def _kind(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            raise self.damaged(f"{what} has the type {number}, which does not exist") from None

    def _value(self, kind: ValueType, what: str, depth: int) -> Value:
        if kind is ValueType.ARRAY:
            return self._array(what, depth + 1)
        if kind is ValueType.STRING:
            return self.text(what, MAX_STRING_BYTES)
        return self._numbers(kind, 1, what)[0]

    def _array(self, what: str, depth: int) -> list[Value]:
        if depth > MAX_NESTING:
            raise self.damaged(f"{what} nests arrays deeper than {MAX_NESTING}")
        kind, count = self._kind(what), self.u64(f"the length of {what}")
        smallest = _NO_NUMBER_BYTES.get(kind) or struct.calcsize(NUMBER_CODES[kind])
        self.require(count * smallest, f"{what}, an array of {count},")
        self._items_left -= count
        if self._items_left < 0:
            raise self.damaged(f"its arrays have over {MAX_ARRAY_ITEMS} items, up to {what}")
        if kind is ValueType.ARRAY:
            return [self._array(what, depth + 1) for _ in range(count)]
        return (
            self._strings(count, what)
            if kind is ValueType.STRING
            else self._numbers(kind, count, what)
        )

    def _numbers(self, kind: ValueType, count: int, what: str) -> list[Value]:
        layout = struct.Struct(f"<{count}{NUMBER_CODES[kind]}")
        return list(layout.unpack(self.take(layout.size, what)))

    def _strings(self, count: int, what: str) -> list[Value]:
        """Vocabularies have hundreds of thousands, so those in the window are read in one loop.

        Tokens need not be UTF-8: they may be parts of characters.
        """
        found: list[Value] = []
        window, at, end = self._window, self._at, len(self._window)
        for _ in range(count):
            first = at + 8
            last = first + _U64.unpack_from(window, at)[0] if first <= end else end + 1
            if last <= end and last - first <= MAX_STRING_BYTES:
                found.append(window[first:last].decode("utf-8", "surrogateescape"))
                at = last
                continue
            self._at = at
            found.append(self.text(what, MAX_STRING_BYTES, strict=False))
            window, at, end = self._window, self._at, len(self._window)
        self._at = at
        return found
