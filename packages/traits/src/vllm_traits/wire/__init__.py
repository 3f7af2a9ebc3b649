"""Bounded binary encoding of what an engine and a backend in another process exchange.

Knows bytes and the types of the protocol; no sockets and no keys. Everything is little-endian. A
decoder compares every count with a cap and with the bytes that are left before it allocates, and
answers anything malformed with `WireError`.
"""

from vllm_traits.wire.batch import decode_batch, encode_batch
from vllm_traits.wire.frame import HEADER_BYTES, MAX_BODY_BYTES, Header, Kind, parse_header
from vllm_traits.wire.info import decode_info, encode_info
from vllm_traits.wire.output import decode_output, encode_output
from vllm_traits.wire.reader import Reader
from vllm_traits.wire.small import (
    decode_blob,
    decode_fault,
    decode_masks,
    encode_blob,
    encode_fault,
    encode_masks,
)
from vllm_traits.wire.writer import Writer

__all__ = [
    "HEADER_BYTES",
    "MAX_BODY_BYTES",
    "Header",
    "Kind",
    "Reader",
    "Writer",
    "decode_batch",
    "decode_blob",
    "decode_fault",
    "decode_info",
    "decode_masks",
    "decode_output",
    "encode_batch",
    "encode_blob",
    "encode_fault",
    "encode_info",
    "encode_masks",
    "encode_output",
    "parse_header",
]
