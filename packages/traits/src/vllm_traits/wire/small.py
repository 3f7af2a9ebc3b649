"""The small frames: masks for sampling, a fault, and bytes of a handshake."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_traits.wire.frame import MAX_TEXT_BYTES, Kind
from vllm_traits.wire.output import read_by_sequence, write_by_sequence
from vllm_traits.wire.reader import Reader
from vllm_traits.wire.writer import Writer


def encode_masks(masks: Mapping[int, bytes], step: int = 0) -> bytes:
    """Allowed tokens of masked sequences, for the batch of a step.

    Raises:
        WireError: A mask or the number of them is larger than the encoding allows.
    """
    writer = Writer()
    write_by_sequence(writer, masks, writer.blob)
    return writer.frame(Kind.MASKS, step)


def decode_masks(frame: bytes) -> dict[int, bytes]:
    """The masks in a frame; the step is in its header.

    Raises:
        WireError: The frame is not one that `encode_masks` makes.
    """
    reader = Reader.of_frame(frame, Kind.MASKS)
    masks = read_by_sequence(reader, reader.blob)
    reader.end()
    return masks


def encode_fault(message: str, step: int = 0) -> bytes:
    """What went wrong with the batch of a step; a long message is cut."""
    writer = Writer()
    whole = message.encode(errors="replace")[:MAX_TEXT_BYTES]
    writer.text(whole.decode(errors="ignore"))
    return writer.frame(Kind.FAULT, step)


def decode_fault(frame: bytes) -> str:
    """The message of a fault.

    Raises:
        WireError: The frame is not one that `encode_fault` makes.
    """
    reader = Reader.of_frame(frame, Kind.FAULT)
    message = reader.text()
    reader.end()
    return message


def encode_blob(kind: Kind, data: bytes) -> bytes:
    """Bytes whose meaning is the handshake's."""
    writer = Writer()
    writer.blob(data)
    return writer.frame(kind)


def decode_blob(frame: bytes, kind: Kind) -> bytes:
    """The bytes of a handshake.

    Raises:
        WireError: The frame is malformed or of another kind.
    """
    reader = Reader.of_frame(frame, kind)
    data = reader.blob()
    reader.end()
    return data
