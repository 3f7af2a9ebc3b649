"""Limits and habits of a backend, sent once when a connection begins."""

from __future__ import annotations

from struct import Struct

from vllm_traits.backend import BackendInfo, KVGroup
from vllm_traits.wire.frame import Kind
from vllm_traits.wire.reader import Reader
from vllm_traits.wire.writer import Writer

# num_blocks, block_size, max_model_len, vocab_size, max_sequences, max_batch_tokens, num_drafts
LIMITS = Struct("<7q")
GROUP = Struct("<5q")  # num_kv_heads, key_dim, value_dim, bytes_per_block, window
MAX_GROUPS = 1 << 10


def encode_info(info: BackendInfo) -> bytes:
    """Limits as one frame.

    Raises:
        WireError: A number or a list is larger than the encoding allows.
    """
    writer = Writer()
    writer.pack(
        LIMITS,
        info.num_blocks,
        info.block_size,
        info.max_model_len,
        info.vocab_size,
        info.max_sequences,
        info.max_batch_tokens,
        info.num_drafts,
    )
    writer.ints(sorted(info.eos_token_ids))
    writer.flags(info.prefix_cacheable)
    writer.blob(info.fingerprint)
    writer.count(len(info.kv_groups), MAX_GROUPS)
    for group in info.kv_groups:
        _write_group(writer, group)
    return writer.frame(Kind.INFO)


def decode_info(frame: bytes) -> BackendInfo:
    """The limits in a frame.

    Raises:
        WireError: The frame is not one that `encode_info` makes.
    """
    reader = Reader.of_frame(frame, Kind.INFO)
    blocks, size, length, vocabulary, sequences, tokens, drafts = reader.unpack(LIMITS)
    eos_token_ids = frozenset(reader.ints())
    (prefix_cacheable,) = reader.flags(1)
    fingerprint = reader.blob()
    num_groups = reader.count(GROUP.size + 12, MAX_GROUPS)
    kv_groups = tuple(_read_group(reader) for _ in range(num_groups))
    reader.end()
    return BackendInfo(
        num_blocks=blocks,
        block_size=size,
        max_model_len=length,
        vocab_size=vocabulary,
        eos_token_ids=eos_token_ids,
        max_sequences=sequences,
        max_batch_tokens=tokens,
        num_drafts=drafts,
        prefix_cacheable=prefix_cacheable,
        kv_groups=kv_groups,
        fingerprint=fingerprint,
    )


def _write_group(writer: Writer, group: KVGroup) -> None:
    writer.text(group.name)
    writer.text(group.dtype)
    writer.ints(group.layers)
    writer.pack(
        GROUP,
        group.num_kv_heads,
        group.key_dim,
        group.value_dim,
        group.bytes_per_block,
        group.window,
    )


def _read_group(reader: Reader) -> KVGroup:
    name, dtype, layers = reader.text(), reader.text(), reader.ints()
    heads, key_dim, value_dim, bytes_per_block, window = reader.unpack(GROUP)
    return KVGroup(name, layers, heads, key_dim, value_dim, dtype, bytes_per_block, window)
