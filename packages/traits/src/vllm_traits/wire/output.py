"""What a step produced, by sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, chain, pairwise
from struct import Struct
from typing import TypeVar

from vllm_traits.batch import BatchOutput, StepCost
from vllm_traits.errors import WireError
from vllm_traits.request import TokenLogprobs
from vllm_traits.wire.frame import MAX_ROWS, Kind
from vllm_traits.wire.params import LONG
from vllm_traits.wire.reader import Reader
from vllm_traits.wire.writer import Writer

Value = TypeVar("Value")

ENTRY = Struct("<idq")  # token_id, logprob, rank
COST = Struct("<qqqd")


def encode_output(output: BatchOutput, step: int = 0) -> bytes:
    """An output as one frame.

    Args:
        output: What the batch produced.
        step: Step of the batch.

    Raises:
        WireError: A number or a list is larger than the encoding allows.
    """
    writer = Writer()
    _write_tokens(writer, output.token_ids)
    write_by_sequence(writer, output.logprobs, lambda each: _write_entries(writer, each))
    write_by_sequence(writer, output.prompt_logprobs, lambda each: _write_entries(writer, each))
    write_by_sequence(writer, output.embeddings, writer.floats)
    write_by_sequence(writer, output.failed, writer.text)
    writer.flags(output.cost is not None)
    if output.cost is not None:
        writer.pack(COST, *output.cost)
    return writer.frame(Kind.OUTPUT, step)


def decode_output(frame: bytes) -> BatchOutput:
    """The output in a frame; its step is in the header.

    Raises:
        WireError: The frame is not one that `encode_output` makes.
    """
    reader = Reader.of_frame(frame, Kind.OUTPUT)
    token_ids = _read_tokens(reader)
    logprobs = read_by_sequence(reader, lambda: _read_entries(reader))
    prompt_logprobs = read_by_sequence(reader, lambda: _read_entries(reader))
    embeddings = read_by_sequence(reader, reader.floats)
    failed = read_by_sequence(reader, reader.text)
    (costs,) = reader.flags(1)
    cost = StepCost(*reader.unpack(COST)) if costs else None
    reader.end()
    return BatchOutput(token_ids, logprobs, prompt_logprobs, embeddings, failed, cost)


def write_by_sequence(
    writer: Writer, values: Mapping[int, Value], write: Callable[[Value], None]
) -> None:
    """A counted list of sequences with a value each."""
    writer.count(len(values), MAX_ROWS)
    for seq_id, value in values.items():
        writer.pack(LONG, seq_id)
        write(value)


def read_by_sequence(reader: Reader, read: Callable[[], Value]) -> dict[int, Value]:
    """What `write_by_sequence` wrote; no sequence may occur twice."""
    values: dict[int, Value] = {}
    for _ in range(reader.count(LONG.size + 4, MAX_ROWS)):
        (seq_id,) = reader.unpack(LONG)
        if seq_id in values:
            raise WireError(f"Sequence {seq_id} occurs twice.")
        values[seq_id] = read()
    return values


def _write_tokens(writer: Writer, token_ids: Mapping[int, tuple[int, ...]]) -> None:
    """Three flat lists: every step has this one for every sequence."""
    writer.longs(tuple(token_ids))
    writer.ints([len(each) for each in token_ids.values()])
    writer.ints(tuple(chain.from_iterable(token_ids.values())))


def _read_tokens(reader: Reader) -> dict[int, tuple[int, ...]]:
    seq_ids, lengths, flat = reader.longs(), reader.ints(), reader.ints()
    ends = tuple(accumulate(lengths, initial=0))
    if len(lengths) != len(seq_ids) or ends[-1] != len(flat) or min(lengths, default=0) < 0:
        raise WireError("The lengths of the sequences do not add up.")
    token_ids = {
        seq_id: flat[start:end]
        for seq_id, (start, end) in zip(seq_ids, pairwise(ends), strict=True)
    }
    if len(token_ids) != len(seq_ids):
        raise WireError("A sequence occurs twice.")
    return token_ids


def _write_entries(writer: Writer, entries: tuple[TokenLogprobs, ...]) -> None:
    writer.count(len(entries))
    for entry in entries:
        writer.pack(ENTRY, entry.token_id, entry.logprob, entry.rank)
        writer.pairs(entry.top)


def _read_entries(reader: Reader) -> tuple[TokenLogprobs, ...]:
    return tuple(_read_entry(reader) for _ in range(reader.count(ENTRY.size + 4)))


def _read_entry(reader: Reader) -> TokenLogprobs:
    token_id, logprob, rank = reader.unpack(ENTRY)
    return TokenLogprobs(token_id, logprob, rank, reader.pairs())
