"""What is encoded comes back; anything else is refused, cheaply and with one kind of error."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from random import Random
from struct import pack, pack_into
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_traits import (
    BackendInfo,
    Batch,
    BatchOutput,
    Chunk,
    KVGroup,
    PoolingParams,
    SamplingParams,
    Start,
    StepCost,
    TokenLogprobs,
    WireError,
)
from vllm_traits.wire import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    Kind,
    Reader,
    decode_batch,
    decode_blob,
    decode_fault,
    decode_info,
    decode_masks,
    decode_output,
    encode_batch,
    encode_blob,
    encode_fault,
    encode_info,
    encode_masks,
    encode_output,
    parse_header,
)

IDS = st.integers(-(2**31), 2**31 - 1)
LONGS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(max_size=20)


def tuples(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=5).map(tuple)


def maps(of: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[int, Any]]:
    return st.dictionaries(LONGS, of, max_size=4)


PAIRS = tuples(st.tuples(IDS, FLOATS))
SAMPLING = st.builds(
    SamplingParams,
    temperature=FLOATS,
    top_k=LONGS,
    top_p=FLOATS,
    min_p=FLOATS,
    presence_penalty=FLOATS,
    frequency_penalty=FLOATS,
    repetition_penalty=FLOATS,
    seed=st.none() | LONGS,
    max_tokens=LONGS,
    min_tokens=LONGS,
    stop_token_ids=st.frozensets(IDS, max_size=5),
    ignore_eos=st.booleans(),
    logit_bias=PAIRS,
    allowed_token_ids=st.none() | tuples(IDS),
    bad_token_ids=tuples(tuples(IDS)),
    logprobs=st.none() | LONGS,
    prompt_logprobs=st.none() | LONGS,
)
POOLING = st.builds(
    PoolingParams,
    pooling=st.sampled_from(["mean", "last", "cls"]),
    normalize=st.booleans(),
    dimensions=st.none() | LONGS,
)
STARTS = st.builds(
    Start,
    seq_id=LONGS,
    token_ids=tuples(IDS),
    params=SAMPLING | POOLING,
    seed=LONGS,
    num_prompt_tokens=IDS,
    adapter=st.none() | TEXT,
)
CHUNKS = st.builds(
    Chunk,
    seq_id=LONGS,
    start=IDS,
    num_tokens=IDS,
    new_blocks=tuples(IDS),
    num_drafts=IDS,
    draft_ids=tuples(IDS),
    sample=st.booleans(),
    masked=st.booleans(),
)
BATCHES = st.builds(
    Batch, chunks=tuples(CHUNKS), starts=tuples(STARTS), released=tuples(LONGS), step=LONGS
)
ENTRIES = tuples(st.builds(TokenLogprobs, token_id=IDS, logprob=FLOATS, rank=LONGS, top=PAIRS))
OUTPUTS = st.builds(
    BatchOutput,
    token_ids=maps(tuples(IDS)),
    logprobs=maps(ENTRIES),
    prompt_logprobs=maps(ENTRIES),
    embeddings=maps(tuples(FLOATS)),
    failed=maps(TEXT),
    cost=st.none() | st.builds(StepCost, LONGS, LONGS, LONGS, FLOATS),
)
GROUPS = st.builds(
    KVGroup,
    name=TEXT,
    layers=tuples(IDS),
    num_kv_heads=LONGS,
    key_dim=LONGS,
    value_dim=LONGS,
    dtype=TEXT,
    bytes_per_block=LONGS,
    window=LONGS,
)
INFOS = st.builds(
    BackendInfo,
    num_blocks=LONGS,
    block_size=LONGS,
    max_model_len=LONGS,
    vocab_size=LONGS,
    eos_token_ids=st.frozensets(IDS, max_size=5),
    max_sequences=LONGS,
    max_batch_tokens=LONGS,
    num_drafts=LONGS,
    prefix_cacheable=st.booleans(),
    kv_groups=tuples(GROUPS),
    fingerprint=st.binary(max_size=40),
)


class Codec(NamedTuple):
    """One kind of frame, and a value that uses every part of it."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    sample: Any


PARAMS = SamplingParams(
    seed=7,
    stop_token_ids=frozenset({3, 4}),
    logit_bias=((5, -1.0), (6, 2.0)),
    allowed_token_ids=(1, 2, 3),
    bad_token_ids=((9, 8), (7,)),
    logprobs=2,
    prompt_logprobs=0,
)
ENTRY = TokenLogprobs(5, -0.25, 1, ((5, -0.25), (6, -2.0)))
CODECS = {
    "batch": Codec(
        encode_batch,
        decode_batch,
        Batch(
            (Chunk(1, 0, 8, (3, 4)), Chunk(2, 9, 3, (), 2, (7, 8), True, True)),
            (Start(1, tuple(range(8)), PARAMS, 11, 8, "lora"), Start(3, (1, 2), PoolingParams())),
            (5, 6),
            12,
        ),
    ),
    "output": Codec(
        encode_output,
        decode_output,
        BatchOutput(
            {1: (4,), 2: (5, 6)},
            {1: (ENTRY,)},
            {2: (ENTRY, ENTRY)},
            {3: (0.5, -0.5)},
            {4: "row_failed"},
            StepCost(10**12, 10**13, 3, 0.25),
        ),
    ),
    "info": Codec(
        encode_info,
        decode_info,
        BackendInfo(
            64,
            16,
            4096,
            1024,
            frozenset({0, 2}),
            kv_groups=(KVGroup("full", (0, 1), 8, 128, 128, "bfloat16", 65536),),
            fingerprint=b"model",
        ),
    ),
    "masks": Codec(encode_masks, decode_masks, {1: b"\x0f" * 8, 2: b"\xf0" * 8}),
    "fault": Codec(encode_fault, decode_fault, "out of memory"),
    "blob": Codec(
        lambda data: encode_blob(Kind.HELLO, data),
        lambda frame: decode_blob(frame, Kind.HELLO),
        b"nonce" * 4,
    ),
}
EVERY = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def survives(decode: Callable[[bytes], Any], frame: bytes) -> bool:
    """Whether a frame is valid; any error but `WireError` fails the test."""
    try:
        decode(frame)
    except WireError:
        return False
    return True


@EVERY
def test_a_value_comes_back_as_it_was(codec: Codec) -> None:
    assert codec.decode(codec.encode(codec.sample)) == codec.sample


@settings(derandomize=True, deadline=None)
@given(BATCHES)
def test_any_batch_comes_back_as_it_was(batch: Batch) -> None:
    assert decode_batch(encode_batch(batch)) == batch


@settings(derandomize=True, deadline=None)
@given(OUTPUTS, LONGS)
def test_any_output_comes_back_as_it_was(output: BatchOutput, step: int) -> None:
    frame = encode_output(output, step)
    assert decode_output(frame) == output
    assert parse_header(frame) == (Kind.OUTPUT, step, len(frame) - HEADER_BYTES)


@settings(derandomize=True, deadline=None)
@given(INFOS, maps(st.binary(max_size=20)))
def test_any_info_and_masks_come_back_as_they_were(
    info: BackendInfo, masks: dict[int, bytes]
) -> None:
    assert decode_info(encode_info(info)) == info
    assert decode_masks(encode_masks(masks)) == masks


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (SamplingParams, SAMPLING),
        (PoolingParams, POOLING),
        (BatchOutput, OUTPUTS),
        (BackendInfo, INFOS),
        (KVGroup, GROUPS),
    ],
)
def test_a_new_field_has_to_be_encoded_too(kind: Any, strategy: Any) -> None:
    """A field that is not generated above would come back as its default, unnoticed."""
    assert strategy.wrapped_strategy.kwargs.keys() == {field.name for field in fields(kind)}


@EVERY
def test_every_truncation_is_refused(codec: Codec) -> None:
    frame = codec.encode(codec.sample)
    for length in range(len(frame)):
        assert not survives(codec.decode, frame[:length])
    assert not survives(codec.decode, frame + b"\x00")


@EVERY
def test_a_body_cut_short_under_an_honest_header_is_refused(codec: Codec) -> None:
    frame = codec.encode(codec.sample)
    for length in range(HEADER_BYTES, len(frame)):
        cut = bytearray(frame[:length])
        pack_into("<I", cut, HEADER_BYTES - 4, length - HEADER_BYTES)
        assert not survives(codec.decode, bytes(cut))


@EVERY
def test_changed_bytes_give_a_value_or_a_wire_error(codec: Codec) -> None:
    random, frame = Random(1), codec.encode(codec.sample)
    outcomes = {False: 0, True: 0}
    for _ in range(3000):
        changed = bytearray(frame)
        for _ in range(random.choice([1, 1, 2, 8])):
            changed[random.randrange(len(frame))] = random.choice([0, 1, 127, 128, 255])
        outcomes[survives(codec.decode, bytes(changed))] += 1
    assert all(outcomes.values()), outcomes


@EVERY
def test_random_bytes_are_refused(codec: Codec) -> None:
    random, header = Random(2), codec.encode(codec.sample)[: HEADER_BYTES - 4]
    for length in range(400):
        noise = random.randbytes(length)
        assert not survives(codec.decode, noise)
        survives(codec.decode, header + pack("<I", length) + noise)


@EVERY
def test_a_huge_number_anywhere_is_refused_without_allocating(codec: Codec) -> None:
    frame = codec.encode(codec.sample)
    huge = [pack("<I", 2**31), pack("<I", 2**32 - 1), pack("<Q", 2**60), pack("<i", 10**6)]
    tracemalloc.start()
    try:
        for place in range(len(frame) - 7):
            for number in huge:
                changed = frame[:place] + number + frame[place + len(number) :]
                survives(codec.decode, changed)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_count_is_compared_with_its_cap_and_with_the_bytes_left() -> None:
    assert Reader(pack("<I", 4) + b"\x00" * 16).count(4, cap=4) == 4
    with pytest.raises(WireError, match="cap of 3"):
        Reader(pack("<I", 4) + b"\x00" * 16).count(4, cap=3)
    with pytest.raises(WireError, match="bytes left"):
        Reader(pack("<I", 4) + b"\x00" * 15).count(4)


def test_another_version_kind_or_magic_is_refused() -> None:
    frame = encode_fault("x")
    for changed in (b"HTTP" + frame[4:], frame[:4] + b"\x02\x00" + frame[6:]):
        with pytest.raises(WireError):
            decode_fault(changed)
    with pytest.raises(WireError, match="BATCH was expected, not FAULT"):
        decode_batch(frame)
    with pytest.raises(WireError, match="longer than"):
        parse_header(frame[: HEADER_BYTES - 4] + pack("<I", MAX_BODY_BYTES + 1))


def test_a_sequence_that_occurs_twice_is_refused() -> None:
    frame = encode_masks({1: b"a", 2: b"a"})
    with pytest.raises(WireError, match="twice"):
        decode_masks(frame.replace(pack("<q", 2), pack("<q", 1)))


@pytest.mark.parametrize("lengths", [(2, 2), (4, -1), (2**31 - 1, 1), (0, 0)])
def test_token_lists_must_add_up(lengths: tuple[int, int]) -> None:
    frame = encode_output(BatchOutput({1: (7,), 2: (8, 9)}))
    honest = pack("<3I", 2, 1, 2)
    assert frame.count(honest) == 1
    with pytest.raises(WireError, match="add up"):
        decode_output(frame.replace(honest, pack("<Iii", 2, *lengths)))


@pytest.mark.parametrize(
    "batch",
    [
        Batch((Chunk(2**63, 0, 1),)),
        Batch((Chunk(1, 2**31, 1),)),
        Batch((Chunk(1, 0, 1, (2**31,)),)),
        Batch((), step=2**63),
        Batch((), (Start(1, (1,), SamplingParams(), adapter="\ud800"),)),
        Batch((), (Start(1, (1,), SamplingParams(), adapter="a" * 5000),)),
    ],
)
def test_what_does_not_fit_is_refused_by_the_encoder(batch: Batch) -> None:
    with pytest.raises(WireError):
        encode_batch(batch)


def test_a_long_fault_is_cut_to_what_may_be_sent() -> None:
    assert decode_fault(encode_fault("ä" * 5000)) == "ä" * 2048


def test_a_step_of_256_decodes_takes_about_8_kilobytes() -> None:
    chunks = tuple(Chunk(seq, 100 + seq, 1, (seq,) if seq % 16 == 0 else ()) for seq in range(256))
    assert len(encode_batch(Batch(chunks, step=9))) < 12 * 1024
