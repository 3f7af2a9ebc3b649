"""Writing a frame from front to back, within the caps that its reader keeps."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from struct import Struct

from vllm_traits.errors import WireError
from vllm_traits.wire.frame import (
    HEADER,
    MAGIC,
    MAX_BLOB_BYTES,
    MAX_BODY_BYTES,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    VERSION,
    Kind,
)
from vllm_traits.wire.reader import BYTE, COUNT


class Writer:
    """Collects the body of a frame; a value that does not fit is a `WireError`."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def pack(self, form: Struct, *values: int | float) -> None:
        """Values of a fixed form."""
        try:
            self._parts.append(form.pack(*values))
        except struct.error as error:
            raise WireError(f"{values} cannot be encoded: {error}.") from None

    def rows(self, form: Struct, rows: Sequence[tuple[int, ...]]) -> None:
        """Rows of one form, without their count."""
        try:
            self._parts += [form.pack(*row) for row in rows]
        except struct.error as error:
            raise WireError(f"A row cannot be encoded: {error}.") from None

    def array(self, code: str, values: Sequence[int | float]) -> None:
        """Numbers of one type, without their count."""
        try:
            self._parts.append(struct.pack(f"<{len(values)}{code}", *values))
        except struct.error as error:
            raise WireError(f"A list cannot be encoded: {error}.") from None

    def count(self, count: int, cap: int = MAX_ITEMS) -> None:
        """A number of items."""
        if count > cap:
            raise WireError(f"{count} items are more than the cap of {cap}.")
        self.pack(COUNT, count)

    def ints(self, values: Sequence[int]) -> None:
        """A counted list of 4-byte ints."""
        self.count(len(values))
        self.array("i", values)

    def longs(self, values: Sequence[int]) -> None:
        """A counted list of 8-byte ints."""
        self.count(len(values))
        self.array("q", values)

    def floats(self, values: Sequence[float]) -> None:
        """A counted list of 8-byte floats."""
        self.count(len(values))
        self.array("d", values)

    def pairs(self, pairs: Sequence[tuple[int, float]]) -> None:
        """A counted list of ids with a float each."""
        self.ints([each for each, _ in pairs])
        self.array("d", [value for _, value in pairs])

    def blob(self, data: bytes, cap: int = MAX_BLOB_BYTES) -> None:
        """Counted bytes."""
        self.count(len(data), cap)
        self._parts.append(data)

    def text(self, text: str, cap: int = MAX_TEXT_BYTES) -> None:
        """A counted string."""
        try:
            self.blob(text.encode(), cap)
        except UnicodeEncodeError:
            raise WireError("A string is not Unicode text.") from None

    def flags(self, *flags: bool) -> None:
        """Up to 8 flags in one byte, the first one lowest."""
        self.pack(BYTE, sum(flag << place for place, flag in enumerate(flags)))

    def body(self) -> bytes:
        """Everything written so far."""
        return b"".join(self._parts)

    def frame(self, kind: Kind, step: int = 0) -> bytes:
        """Everything written so far, behind a header."""
        body = self.body()
        if len(body) > MAX_BODY_BYTES:
            raise WireError(f"A body of {len(body)} bytes is longer than {MAX_BODY_BYTES}.")
        try:
            return HEADER.pack(MAGIC, VERSION, kind, step, len(body)) + body
        except struct.error as error:
            raise WireError(f"Step {step} cannot be encoded: {error}.") from None
