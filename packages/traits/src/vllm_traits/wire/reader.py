"""Reading a frame from front to back, never past its end and never more than a cap."""

from __future__ import annotations

from struct import Struct, unpack
from typing import Any

from vllm_traits.errors import WireError
from vllm_traits.wire.frame import (
    HEADER_BYTES,
    MAX_BLOB_BYTES,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    Kind,
    parse_header,
)

COUNT = Struct("<I")
BYTE = Struct("<B")


class Reader:
    """A place in a run of bytes that moves on with every read.

    Args:
        data: What is read; `end` must be reached exactly.
        step: Step in the header of the frame.
    """

    __slots__ = ("_data", "_place", "step")

    def __init__(self, data: bytes | memoryview, step: int = 0) -> None:
        self._data = memoryview(data)
        self._place = 0
        self.step = step

    @classmethod
    def of_frame(cls, frame: bytes, kind: Kind) -> Reader:
        """A reader of the body of a whole frame.

        Raises:
            WireError: The frame is malformed, of another kind, or not as long as it says.
        """
        header = parse_header(frame)
        if header.kind is not kind:
            raise WireError(f"A frame of kind {kind.name} was expected, not {header.kind.name}.")
        if len(frame) != HEADER_BYTES + header.body_bytes:
            raise WireError(f"{len(frame)} bytes are not a frame with {header.body_bytes} of body.")
        return cls(memoryview(frame)[HEADER_BYTES:], header.step)

    def take(self, num_bytes: int) -> memoryview:
        """The next bytes, not copied."""
        end = self._place + num_bytes
        if num_bytes < 0 or end > len(self._data):
            left = len(self._data) - self._place
            raise WireError(f"{num_bytes} bytes were promised and {left} are left.")
        taken = self._data[self._place : end]
        self._place = end
        return taken

    def unpack(self, form: Struct) -> tuple[Any, ...]:
        """The next values of a fixed form."""
        return form.unpack(self.take(form.size))

    def checked(self, count: int, item_bytes: int, cap: int = MAX_ITEMS) -> int:
        """The same count, if so many items may follow and can fit.

        Args:
            count: How many items are announced.
            item_bytes: The least an item takes.
            cap: The most that are accepted.
        """
        if count > cap or count * item_bytes > len(self._data) - self._place:
            raise WireError(f"{count} items are more than the cap of {cap} or the bytes left.")
        return count

    def count(self, item_bytes: int, cap: int = MAX_ITEMS) -> int:
        """A number of items, checked."""
        return self.checked(self.unpack(COUNT)[0], item_bytes, cap)

    def array(self, code: str, item_bytes: int, count: int) -> tuple[Any, ...]:
        """So many numbers of one type; the count was checked."""
        return unpack(f"<{count}{code}", self.take(count * item_bytes))

    def ints(self) -> tuple[int, ...]:
        """A counted list of 4-byte ints."""
        return self.array("i", 4, self.count(4))

    def longs(self) -> tuple[int, ...]:
        """A counted list of 8-byte ints."""
        return self.array("q", 8, self.count(8))

    def floats(self) -> tuple[float, ...]:
        """A counted list of 8-byte floats."""
        return self.array("d", 8, self.count(8))

    def pairs(self) -> tuple[tuple[int, float], ...]:
        """A counted list of ids with a float each."""
        count = self.count(12)
        ids = self.array("i", 4, count)
        return tuple(zip(ids, self.array("d", 8, count), strict=True))

    def blob(self, cap: int = MAX_BLOB_BYTES) -> bytes:
        """Counted bytes."""
        return bytes(self.take(self.count(1, cap)))

    def text(self, cap: int = MAX_TEXT_BYTES) -> str:
        """A counted string."""
        try:
            return self.blob(cap).decode()
        except UnicodeDecodeError:
            raise WireError("A string is not UTF-8.") from None

    def flags(self, number: int) -> tuple[bool, ...]:
        """So many flags of one byte; the other bits must be 0."""
        bits: int = self.unpack(BYTE)[0]
        if bits >> number:
            raise WireError(f"Flags {bits:#x} are not known.")
        return tuple(bool(bits >> place & 1) for place in range(number))

    def end(self) -> None:
        """Check that nothing is left."""
        if self._place != len(self._data):
            raise WireError(f"{len(self._data) - self._place} bytes are left over.")
