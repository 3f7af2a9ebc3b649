"""The header that every frame begins with, and the caps that both sides keep."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from vllm_traits.errors import WireError

MAGIC = b"VLLW"
VERSION = 1
HEADER = Struct("<4sHHqI")  # magic, version, kind, step, length of the body
HEADER_BYTES = HEADER.size

MAX_BODY_BYTES = 64 << 20
MAX_ROWS = 1 << 16  # sequences, chunks or starts in a frame
MAX_ITEMS = 1 << 22  # ids, or entries of any other list
MAX_TEXT_BYTES = 1 << 12  # names and codes
MAX_BLOB_BYTES = 1 << 20  # a mask, a fingerprint


class Kind(IntEnum):
    """What the body of a frame holds."""

    HELLO = 1
    PROOF = 2
    INFO = 3
    BATCH = 4
    MASKS = 5
    OUTPUT = 6
    FAULT = 7


class Header(NamedTuple):
    """The first bytes of a frame.

    Attributes:
        kind: What the body holds.
        step: Step of the batch it belongs to; 0 for frames that belong to none.
        body_bytes: Length of what follows.
    """

    kind: Kind
    step: int
    body_bytes: int


def parse_header(data: bytes | memoryview, max_body_bytes: int = MAX_BODY_BYTES) -> Header:
    """Read the first `HEADER_BYTES` of a frame.

    Raises:
        WireError: It is not a frame of this version, or its body is longer than the cap.
    """
    if len(data) < HEADER_BYTES:
        raise WireError(f"A frame of {len(data)} bytes has no whole header.")
    magic, version, kind, step, body_bytes = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError("These bytes are not a frame: the first four are wrong.")
    if version != VERSION:
        raise WireError(f"The frame has version {version}, this side speaks version {VERSION}.")
    if body_bytes > max_body_bytes:
        raise WireError(f"A body of {body_bytes} bytes is longer than {max_body_bytes}.")
    try:
        return Header(Kind(kind), step, body_bytes)
    except ValueError:
        raise WireError(f"A frame of kind {kind} is not known.") from None
