"""Headers that are sound, damaged or hostile; every file is made here from its bytes."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_models.gguf.header import TensorInfo, read_header
from vllm_models.gguf.types import GgmlType, ValueType, block_bytes, block_size, row_bytes
from vllm_traits import ModelError

ROOT = Path(__file__).parents[3]
VOCABULARIES = sorted((ROOT.parent / "shared/data/vocab").glob("*.gguf"))
MAX_SECONDS, MAX_BYTES = 0.05, 50 << 20


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(content: str | bytes) -> bytes:
    raw = content if isinstance(content, bytes) else content.encode()
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + items


def tensor(
    name: str | bytes = "a.weight", dims: Sequence[int] = (4, 2), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


ARCHITECTURE = key("general.architecture", ValueType.STRING, text("llama"))
DATA = bytes(range(64))


def whole(
    *keys: bytes,
    tensors: Sequence[bytes] = (),
    data: bytes = DATA,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; `counts` are those of tensors and keys that it claims."""
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + u32(version) + u64(num_tensors) + u64(num_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def aligned(kind: int, value: bytes) -> bytes:
    return whole(key("general.alignment", kind, value), tensors=[tensor()])


def numbered(name: str, number: int) -> bytes:
    return key(name, ValueType.U32, u32(number))


class Hostile(NamedTuple):
    content: Callable[[], bytes]
    message: str


CLAIMS = {"2^64-1": (1 << 64) - 1, "2^40": 1 << 40, "2^32": 1 << 32}
HOSTILE = {
    "empty": Hostile(lambda: b"", "it has 0 bytes"),
    "three bytes": Hostile(lambda: b"GGU", "it has 3 bytes"),
    "magic alone": Hostile(lambda: b"GGUF", "the version needs 4 bytes, but only 0 are left"),
    "magic and version alone": Hostile(lambda: b"GGUF" + u32(3), "number of tensors needs 8"),
    "another magic": Hostile(lambda: b"GGML" + bytes(60), "it begins with b'GGML'"),
    "version 0": Hostile(lambda: whole(version=0), "the GGUF version 0;"),
    "version 1": Hostile(lambda: whole(version=1), "the GGUF version 1;"),
    "version 99": Hostile(lambda: whole(version=99), "the GGUF version 99;"),
    "big-endian": Hostile(lambda: whole(version=3 << 24), "big-endian"),
    **{
        f"{label} tensors": Hostile(
            lambda count=count: whole(ARCHITECTURE, counts=(count, 1)), f"claims {count} tensors"
        )
        for label, count in CLAIMS.items()
    },
    **{
        f"{label} keys": Hostile(
            lambda count=count: whole(ARCHITECTURE, counts=(0, count)),
            f"claims {count} metadata keys",
        )
        for label, count in CLAIMS.items()
    },
    "more keys than bytes": Hostile(
        lambda: whole(ARCHITECTURE, counts=(0, 60_000)), "60000 metadata keys needs 840000 bytes"
    ),
    "more tensors than bytes": Hostile(
        lambda: whole(ARCHITECTURE, counts=(60_000, 1)), "60000 tensors needs 1980000 bytes"
    ),
    "key length 2^64-1": Hostile(
        lambda: whole(u64((1 << 64) - 1) + b"a" * 20), "metadata key 0 has 18446744073709551615"
    ),
    "key length 2^62": Hostile(
        lambda: whole(u64(1 << 62) + b"a" * 20), "metadata key 0 has 4611686018427387904 bytes"
    ),
    "key length past the end": Hostile(
        lambda: whole(u64(5000) + b"a" * 20), "metadata key 0 needs 5000 bytes"
    ),
    "key without a name": Hostile(lambda: whole(numbered("", 1)), "key 0, '', is no plain name"),
    "key with a NUL": Hostile(lambda: whole(numbered("a\0b", 1)), r"'a\x00b', is no plain name"),
    "string of 2^63": Hostile(
        lambda: whole(key("a", ValueType.STRING, u64(1 << 63))), "the value of 'a' has 9223372"
    ),
    "string past the end": Hostile(
        lambda: whole(key("a", ValueType.STRING, u64(1000))), "the value of 'a' needs 1000 bytes"
    ),
    "value of type 99": Hostile(lambda: whole(key("a", 99, bytes(8))), "the type 99, which does"),
    "array of type 99": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(99, 1, bytes(8)))), "the type 99, which does"
    ),
    "array of 2^60": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.U32, 1 << 60))),
        "an array of 1152921504606846976, needs 4611686018427387904 bytes",
    ),
    "array of 10^7 short strings": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.STRING, 10**7, text("b") * 99))),
        "an array of 10000000, needs 80000000 bytes",
    ),
    "array of 10^7 in the file": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.U8, 10**7, bytes(10**7)))),
        "its arrays have over 8388608 items",
    ),
    "string in an array past the end": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.STRING, 2, text("b") + u64(999)))),
        "the value of 'a' needs 999 bytes",
    ),
    "string of 2^63 in an array": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.STRING, 1, u64(1 << 63)))),
        "the value of 'a' has 9223372036854775808 bytes",
    ),
    "2000 nested arrays": Hostile(
        lambda: whole(key("a", ValueType.ARRAY, array(ValueType.ARRAY, 1) * 2000)),
        "nests arrays deeper than 4",
    ),
    "a key twice": Hostile(
        lambda: whole(numbered("a", 1), numbered("a", 1)), "the metadata key 'a' is there twice"
    ),
    "alignment 0": Hostile(lambda: aligned(ValueType.U32, u32(0)), "alignment is 0, but must be"),
    "alignment 13": Hostile(lambda: aligned(ValueType.U32, u32(13)), "alignment is 13, but must"),
    "alignment 2^31": Hostile(
        lambda: aligned(ValueType.U32, u32(1 << 31)), "alignment is 2147483648, but must"
    ),
    "alignment of type U64": Hostile(
        lambda: aligned(ValueType.U64, u64(32)), "alignment is of type U64, but must be U32"
    ),
    "alignment of type string": Hostile(
        lambda: aligned(ValueType.STRING, text("32")), "is of type STRING, but must be U32"
    ),
    "0 dimensions": Hostile(lambda: whole(tensors=[tensor(dims=())]), "has 0 dimensions"),
    "1000 dimensions": Hostile(
        lambda: whole(tensors=[tensor(dims=[1] * 1000)]), "has 1000 dimensions"
    ),
    "2^32-1 dimensions": Hostile(
        lambda: whole(tensors=[text("a") + u32((1 << 32) - 1) + bytes(64)]), "has 4294967295 dim"
    ),
    "dimensions that wrap to 0": Hostile(
        lambda: whole(tensors=[tensor(dims=(1 << 32, 1 << 32))]), "the impossible shape"
    ),
    "dimensions that wrap to 32": Hostile(
        lambda: whole(tensors=[tensor(dims=(32, (1 << 59) + 1, 32))]), "the impossible shape"
    ),
    "dimensions that wrap to less than 0": Hostile(
        lambda: whole(tensors=[tensor(dims=((1 << 63) + 32, 1))]), "the impossible shape"
    ),
    "bytes beyond any disk": Hostile(
        lambda: whole(tensors=[tensor(dims=(1 << 24, 1 << 24))]), "ends at byte 1125899906842"
    ),
    "dimension 0": Hostile(
        lambda: whole(tensors=[tensor(dims=(32, 0))]), "the impossible shape [0, 32]"
    ),
    "rows that are no blocks": Hostile(
        lambda: whole(tensors=[tensor(dims=(48, 2), kind=GgmlType.Q8_0)]),
        "rows of 48 weights, which Q8_0 holds in blocks of 32",
    ),
    "type 255": Hostile(
        lambda: whole(tensors=[tensor(kind=255)]), "is of type 255 (unknown), which is not supp"
    ),
    "a type that is known by name": Hostile(
        lambda: whole(tensors=[tensor(kind=16)]), "is of type 16 (IQ2_XXS), which is not supp"
    ),
    "offset past the end": Hostile(
        lambda: whole(tensors=[tensor(offset=1 << 20)]), "ends at byte 1048704, but the file has"
    ),
    "offset 2^64-32": Hostile(
        lambda: whole(tensors=[tensor(offset=(1 << 64) - 32)]), "ends at byte 18446744073709551"
    ),
    "offset that is not aligned": Hostile(
        lambda: whole(tensors=[tensor(offset=4)]), "is no multiple of the alignment 32"
    ),
    "tensors that overlap": Hostile(
        lambda: whole(tensors=[tensor("a", (16,)), tensor("b", (8,), offset=32)]),
        "the tensors 'a' and 'b' overlap",
    ),
    "tensors at the same place": Hostile(
        lambda: whole(tensors=[tensor("a"), tensor("b")]), "the tensors 'a' and 'b' overlap"
    ),
    "a tensor twice": Hostile(
        lambda: whole(tensors=[tensor("a"), tensor("a", offset=32)]), "'a' is there twice"
    ),
    "data that is cut off": Hostile(
        lambda: whole(tensors=[tensor(dims=(16,))], data=DATA[:63]),
        "ends at byte 128, but the file has 127",
    ),
    "no data at all": Hostile(
        lambda: whole(tensors=[tensor()], data=b"", alignment=1), "ends at byte 128, but the file"
    ),
    "entries that are cut off": Hostile(
        lambda: whole(tensors=[tensor()], data=b"", alignment=1)[:-3], "the offset of tensor 'a."
    ),
    "name that is a path": Hostile(
        lambda: whole(tensors=[tensor("../../a.weight")]), "tensor '../../a.weight' has no plain"
    ),
    "name with a backslash": Hostile(
        lambda: whole(tensors=[tensor(r"..\a")]), r"tensor '..\\a' has no plain name"
    ),
    "name with a NUL": Hostile(
        lambda: whole(tensors=[tensor("a\0.weight")]), r"tensor 'a\x00.weight' has no plain name"
    ),
    "tensor without a name": Hostile(
        lambda: whole(tensors=[tensor("")]), "tensor '' has no plain name"
    ),
    "name of 1 MB": Hostile(
        lambda: whole(tensors=[tensor("a" * (1 << 20))]), "the name of tensor 0 has 1048576 bytes"
    ),
    "name that is not UTF-8": Hostile(
        lambda: whole(tensors=[tensor(b"a\xff")]), "the name of tensor 0 is not UTF-8 at byte 1"
    ),
    "key that is not UTF-8": Hostile(
        lambda: whole(key(b"\xc3\x28", 4, u32(1))), "metadata key 0 is not UTF-8 at byte 0"
    ),
    "string that is not UTF-8": Hostile(
        lambda: whole(key("a", ValueType.STRING, text(b"\x80"))), "the value of 'a' is not UTF-8"
    ),
}


def seconds_to_refuse(path: Path) -> float:
    """Of this thread; the best of three, since a collection of garbage may fall into one."""

    def once() -> float:
        start = time.thread_time()
        with pytest.raises(ModelError):
            read_header(path)
        return time.thread_time() - start

    return min(once() for _ in range(3))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_at_once_without_much_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[name].content())
    tracemalloc.start()
    with pytest.raises(ModelError) as refused:
        read_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(refused.value)
    assert HOSTILE[name].message in message
    assert message.startswith(str(path))
    advice = ("download or convert it again", "Convert the model again", "Take another")
    assert any(words in message for words in advice)
    assert len(message) < 1000
    assert peak < MAX_BYTES
    assert seconds_to_refuse(path) < MAX_SECONDS


SOUND = whole(
    ARCHITECTURE,
    key("a.numbers", ValueType.ARRAY, array(ValueType.I16, 3, struct.pack("<3h", 1, -2, 3))),
    key("a.names", ValueType.ARRAY, array(ValueType.STRING, 2, text("x") + text("é"))),
    key("a.flag", ValueType.BOOL, b"\x01"),
    numbered("general.alignment", 32),
    tensors=[tensor("a", (4, 2)), tensor("b", (32, 1), GgmlType.Q8_0, offset=32)],
    data=bytes(66),
)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SOUND)
    found = read_header(path)
    start = len(SOUND) - 66
    assert found.metadata == {
        "general.architecture": "llama",
        "a.numbers": [1, -2, 3],
        "a.names": ["x", "é"],
        "a.flag": True,
        "general.alignment": 32,
    }
    assert found.tensors == {
        "a": TensorInfo("a", (2, 4), GgmlType.F32, path, start, 32),
        "b": TensorInfo("b", (1, 32), GgmlType.Q8_0, path, start + 32, 34),
    }
    assert found.paths == (path,)


@pytest.mark.parametrize(
    ("kind", "layout", "value"),
    [
        (ValueType.U8, "B", 255),
        (ValueType.I8, "b", -128),
        (ValueType.U16, "H", 65535),
        (ValueType.I16, "h", -32768),
        (ValueType.U32, "I", 4294967295),
        (ValueType.I32, "i", -2147483648),
        (ValueType.F32, "f", 0.5),
        (ValueType.BOOL, "?", False),
        (ValueType.U64, "Q", 18446744073709551615),
        (ValueType.I64, "q", -9223372036854775808),
        (ValueType.F64, "d", 0.1),
    ],
)
def test_every_type_of_number_is_read_alone_and_in_nested_arrays(
    kind: ValueType, layout: str, value: float, tmp_path: Path
) -> None:
    path, raw = tmp_path / "model.gguf", struct.pack("<" + layout, value)
    nested = array(ValueType.ARRAY, 2, array(kind, 2, raw * 2) + array(kind, 0))
    path.write_bytes(whole(key("a", kind, raw), key("b", ValueType.ARRAY, nested)))
    found = read_header(path).metadata
    assert found == {"a": value, "b": [[value, value], []]}
    assert type(found["a"]) is type(value)


def test_tokens_that_are_no_utf_8_keep_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    items = text(b"\xf0\x9f") + text("whole")
    path.write_bytes(whole(key("a", ValueType.ARRAY, array(ValueType.STRING, 2, items))))
    [part, other] = read_header(path).metadata["a"]
    assert part.encode("utf-8", "surrogateescape") == b"\xf0\x9f"
    assert other == "whole"


def test_a_long_vocabulary_is_read_in_pieces_and_quickly(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = [f"token {index} " + "x" * (index % 50) for index in range(262_144)]
    tokens[1000] = "y" * 600_000  # longer than what is read at once
    items = b"".join(map(text, tokens))
    path.write_bytes(whole(key("a", ValueType.ARRAY, array(ValueType.STRING, len(tokens), items))))
    start = time.process_time()
    found = read_header(path).metadata["a"]
    assert time.process_time() - start < 1.0
    assert found == tokens


def test_the_tensors_may_be_left_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole(ARCHITECTURE, tensors=[tensor(kind=255)]))
    found = read_header(path, tensors=False)
    assert found.metadata == {"general.architecture": "llama"}
    assert found.tensors == {}


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(ModelError, match=r"is not a file; give the path of a \.gguf file"):
            read_header(path)


def reads_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = read_header(path)
    except ModelError as refused:
        assert str(path) in str(refused)
    else:
        for info in found.tensors.values():
            assert 0 < info.offset <= info.offset + info.num_bytes <= len(content)


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=8
    ),
    length=st.integers(0, len(SOUND)),
)
def test_any_change_of_a_file_is_read_or_refused(
    changes: list[tuple[int, int]], length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(SOUND)
    for place, byte in changes:
        content[place] = byte
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    reads_or_refuses(path, bytes(content))
    reads_or_refuses(path, bytes(content[:length]))


def test_any_single_bit_of_a_header_may_be_wrong(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for bit in range(8 * (len(SOUND) - 66)):
        content = bytearray(SOUND)
        content[bit // 8] ^= 1 << bit % 8
        reads_or_refuses(path, bytes(content))


def part(index: int, count: int, *more: bytes, tensors: Sequence[bytes] = ()) -> bytes:
    keys = numbered("split.no", index), numbered("split.count", count), *more
    return whole(*keys, tensors=tensors)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A set; the first file has the metadata and no tensor, as splitting tools may do."""
    total = numbered("split.tensors.count", 3)
    contents = [
        part(0, 3, ARCHITECTURE, total),
        part(1, 3, tensors=[tensor("a"), tensor("b", offset=32)]),
        part(2, 3, tensors=[tensor("c", (4, 4))]),
    ]
    paths = [tmp_path / f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_any_file_of_a_set_stands_for_the_set(three: list[Path]) -> None:
    for path in three:
        found = read_header(path)
        assert found.metadata["general.architecture"] == "llama"
        assert found.paths == tuple(three)
        assert {name: info.path for name, info in found.tensors.items()} == {
            "a": three[1],
            "b": three[1],
            "c": three[2],
        }
        first = read_header(path, tensors=False)
        assert first.metadata == found.metadata
        assert first.paths == (three[0],)


def test_missing_files_of_a_set_are_named(three: list[Path]) -> None:
    three[0].unlink()
    three[2].unlink()
    with pytest.raises(ModelError) as refused:
        read_header(three[1])
    assert "lacks model-00001-of-00003.gguf, model-00003-of-00003.gguf, of" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (part(1, 3, tensors=[tensor("c")]), "split.no and split.count are 1 and 3, but the file"),
        (part(2, 4, tensors=[tensor("c")]), "split.no and split.count are 2 and 4, but the file"),
        (whole(tensors=[tensor("c")]), "split.no and split.count are 0 and 1, but the file"),
        (part(2, 3, tensors=[tensor("b")]), "has the tensor 'b', and so has model-00002-of-00003"),
        (part(2, 3), "says that its set has 3 tensors (split.tensors.count), but there are 2"),
    ],
)
def test_files_that_are_no_set_are_refused(content: bytes, message: str, three: list[Path]) -> None:
    three[2].write_bytes(content)
    with pytest.raises(ModelError) as refused:
        read_header(three[0])
    assert message in str(refused.value)


@pytest.mark.parametrize("place", ["00000-of-00002", "00003-of-00002", "00001-of-99999"])
def test_a_file_number_that_no_set_has_is_refused(place: str, tmp_path: Path) -> None:
    path = tmp_path / f"model-{place}.gguf"
    path.write_bytes(SOUND)
    with pytest.raises(ModelError, match="a set has 1 to 1000 files"):
        read_header(path)


def test_a_file_of_a_set_under_another_name_is_refused(three: list[Path]) -> None:
    renamed = three[0].rename(three[0].with_name("model.gguf"))
    with pytest.raises(ModelError, match="Give the files of a set their original names"):
        read_header(renamed)


@pytest.mark.skipif(not VOCABULARIES, reason="needs the vocabularies beside the checkout")
def test_a_real_vocabulary_is_read_as_the_reference_does() -> None:
    """The smallest only: the reference takes long."""
    path = min(VOCABULARIES, key=lambda path: path.stat().st_size)
    found = read_header(path)
    fields = gguf.GGUFReader(path).fields
    assert found.metadata.keys() == {name for name in fields if not name.startswith("GGUF.")}
    for name, value in found.metadata.items():
        assert value == fields[name].contents(), name


@pytest.mark.skipif(not VOCABULARIES, reason="needs the vocabularies beside the checkout")
@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_real_vocabularies_are_whole(path: Path) -> None:
    found = read_header(path)
    tokens = found.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(set(tokens)) == len(found.metadata["tokenizer.ggml.token_type"])
    assert all(isinstance(token, str) for token in tokens)
    assert found.tensors == {}


@pytest.mark.parametrize("kind", GgmlType)
def test_blocks_have_the_sizes_of_the_reference(kind: GgmlType) -> None:
    reference = gguf.GGMLQuantizationType(kind)
    assert reference.name == kind.name
    assert (block_size(kind), block_bytes(kind)) == gguf.GGML_QUANT_SIZES[reference]
    assert row_bytes(kind, 4 * block_size(kind)) == 4 * block_bytes(kind)
    if block_size(kind) > 1:
        with pytest.raises(ValueError, match="no multiple of"):
            row_bytes(kind, block_size(kind) + 1)


def test_the_reader_needs_neither_torch_nor_numpy() -> None:
    modules = "vllm_models.gguf.header, vllm_models.gguf.types, sys"
    check = f"import {modules}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
