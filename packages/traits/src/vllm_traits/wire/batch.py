"""A batch: one fixed row per chunk, then flat ids, then the sequences that enter.

In the steady state a frame is a header and 32 bytes per sequence.
"""

from __future__ import annotations

from itertools import chain
from struct import Struct

from vllm_traits.batch import Batch, Chunk, Start
from vllm_traits.errors import WireError
from vllm_traits.wire.frame import MAX_BODY_BYTES, MAX_ROWS, Kind
from vllm_traits.wire.params import read_params, write_params
from vllm_traits.wire.reader import Reader
from vllm_traits.wire.writer import Writer

# seq_id, start, num_tokens, num_drafts, flags, numbers of new blocks and of draft ids
ROW = Struct("<qiiiIII")
FLAGS = ((False, False), (True, False), (False, True), (True, True))  # sample, masked
START = Struct("<qqi")  # seq_id, seed, num_prompt_tokens


def encode_batch(batch: Batch) -> bytes:
    """A batch as one frame.

    Raises:
        WireError: A number or a list is larger than the encoding allows.
    """
    writer = Writer()
    writer.count(len(batch.chunks), MAX_ROWS)
    writer.rows(ROW, [_row(chunk) for chunk in batch.chunks])
    writer.ints(tuple(chain.from_iterable(chunk.new_blocks for chunk in batch.chunks)))
    writer.ints(tuple(chain.from_iterable(chunk.draft_ids for chunk in batch.chunks)))
    writer.longs(batch.released)
    writer.count(len(batch.starts), MAX_ROWS)
    for start in batch.starts:
        writer.blob(_start_body(start), MAX_BODY_BYTES)
    return writer.frame(Kind.BATCH, batch.step)


def _row(chunk: Chunk) -> tuple[int, ...]:
    seq_id, start, num_tokens, new_blocks, num_drafts, draft_ids, sample, masked = chunk
    flags = FLAGS.index((sample, masked))
    return seq_id, start, num_tokens, num_drafts, flags, len(new_blocks), len(draft_ids)


def decode_batch(frame: bytes) -> Batch:
    """The batch in a frame.

    Raises:
        WireError: The frame is not one that `encode_batch` makes.
    """
    reader = Reader.of_frame(frame, Kind.BATCH)
    rows = reader.take(reader.count(ROW.size, MAX_ROWS) * ROW.size)
    chunks = _chunks(rows, reader.ints(), reader.ints())
    released = reader.longs()
    num_starts = reader.count(4, MAX_ROWS)
    starts = tuple(_read_start(reader) for _ in range(num_starts))
    reader.end()
    return Batch(chunks, starts, released, reader.step)


def _chunks(
    rows: memoryview, blocks: tuple[int, ...], drafts: tuple[int, ...]
) -> tuple[Chunk, ...]:
    """Rows with their shares of the flat lists, which must be used up exactly."""
    chunks: list[Chunk] = []
    flags: int
    block = draft = 0
    for row in ROW.iter_unpack(rows):
        seq_id, start, num_tokens, num_drafts, flags, num_blocks, num_ids = row
        if flags >= len(FLAGS):
            raise WireError(f"Flags {flags:#x} are not known.")
        sample, masked = FLAGS[flags]
        new_blocks = blocks[block : block + num_blocks]
        draft_ids = drafts[draft : draft + num_ids]
        block, draft = block + num_blocks, draft + num_ids
        chunks.append(
            Chunk(seq_id, start, num_tokens, new_blocks, num_drafts, draft_ids, sample, masked)
        )
    if (block, draft) != (len(blocks), len(drafts)):
        raise WireError("The rows ask for other numbers of blocks or drafts than the frame has.")
    return tuple(chunks)


def _start_body(start: Start) -> bytes:
    writer = Writer()
    writer.pack(START, start.seq_id, start.seed, start.num_prompt_tokens)
    writer.ints(start.token_ids)
    writer.flags(start.adapter is not None)
    if start.adapter is not None:
        writer.text(start.adapter)
    write_params(writer, start.params)
    return writer.body()


def _read_start(outer: Reader) -> Start:
    reader = Reader(outer.take(outer.count(1, MAX_BODY_BYTES)))
    seq_id, seed, num_prompt_tokens = reader.unpack(START)
    token_ids = reader.ints()
    (adapts,) = reader.flags(1)
    adapter = reader.text() if adapts else None
    params = read_params(reader)
    reader.end()
    return Start(seq_id, token_ids, params, seed, num_prompt_tokens, adapter)
