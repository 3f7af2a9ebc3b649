"""Files that are written here, read by our reader and by the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from vllm_models.gguf.header import read_header
from vllm_models.gguf.types import GgmlType, ValueType
from vllm_models.gguf.write import NewTensor, Typed, write_gguf
from vllm_traits import ModelError

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.text": "käse 🧀",
    "a.count": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.largest": (1 << 64) - 1,
    "a.very_negative": -(1 << 40),
    "a.ratio": 0.5,
    "a.flag": True,
    "a.tokens": ["x", "", "é"],
    "a.types": [1, 3, 6],
    "a.large_ids": [1, 3_000_000_000],
    "a.scores": [0.5, -1],
    "a.flags": [True, False],
    "a.nested": [[1], [2, 3]],
    "a.short": Typed(ValueType.U16, 3),
    "a.wide": Typed(ValueType.F64, 0.1),
    "a.bytes": Typed(ValueType.U8, [0, 255]),
    "a.none": Typed(ValueType.STRING, []),
}
TYPES = {
    "a.count": [gguf.GGUFValueType.UINT32],
    "a.negative": [gguf.GGUFValueType.INT32],
    "a.large": [gguf.GGUFValueType.UINT64],
    "a.very_negative": [gguf.GGUFValueType.INT64],
    "a.ratio": [gguf.GGUFValueType.FLOAT32],
    "a.flag": [gguf.GGUFValueType.BOOL],
    "a.tokens": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING],
    "a.types": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32],
    "a.large_ids": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32],
    "a.scores": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.FLOAT32],
    "a.short": [gguf.GGUFValueType.UINT16],
    "a.wide": [gguf.GGUFValueType.FLOAT64],
    "a.bytes": [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8],
}


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def tensors() -> dict[str, tuple[np.ndarray, GgmlType]]:
    numbers = np.random.default_rng(0)
    return {
        "norm.weight": (numbers.standard_normal(5).astype(np.float32), GgmlType.F32),
        "half.weight": (numbers.standard_normal((3, 7)).astype(np.float16), GgmlType.F16),
        "blocks.weight": (numbers.integers(0, 256, (3, 2, 144), np.uint8), GgmlType.Q4_K),
        "last.weight": (numbers.integers(0, 256, (1, 34), np.uint8), GgmlType.Q8_0),
    }


SHAPES = {
    "norm.weight": (5,),
    "half.weight": (3, 7),
    "blocks.weight": (3, 2, 256),
    "last.weight": (1, 32),
}


def new_tensors() -> list[NewTensor]:
    return [
        NewTensor(name, SHAPES[name], kind, array.tobytes)
        for name, (array, kind) in tensors().items()
    ]


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_our_reader_finds_what_was_written(alignment: int, tmp_path: Path) -> None:
    path, metadata = tmp_path / "model.gguf", {**METADATA, "general.alignment": alignment}
    write_gguf(path, metadata, new_tensors())
    found = read_header(path)
    assert found.metadata == {key: plain(value) for key, value in metadata.items()}
    content = path.read_bytes()
    for name, (array, kind) in tensors().items():
        info = found.tensors[name]
        assert (info.shape, info.type) == (SHAPES[name], kind)
        assert info.offset % alignment == 0
        assert content[info.offset : info.offset + info.num_bytes] == array.tobytes()
    assert list(tmp_path.iterdir()) == [path]


def test_the_reference_finds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {key: value for key, value in METADATA.items() if key != "a.nested"}
    write_gguf(path, metadata, new_tensors())
    found = gguf.GGUFReader(path)
    for key, value in metadata.items():
        if plain(value) != []:
            assert found.fields[key].contents() == plain(value), key
    assert {key: found.fields[key].types for key in TYPES} == TYPES
    for tensor, (name, (array, kind)) in zip(found.tensors, tensors().items(), strict=True):
        assert (tensor.name, tensor.tensor_type) == (name, kind)
        assert tuple(reversed(tensor.shape.tolist())) == SHAPES[name]
        assert tensor.data.tobytes() == array.tobytes()


def test_a_vocabulary_needs_no_tensors_and_keeps_bytes_that_are_no_text(tmp_path: Path) -> None:
    path, token = tmp_path / "model.gguf", b"\xf0\x9f".decode("utf-8", "surrogateescape")
    write_gguf(path, {"a.tokens": ["x", token]}, [])
    assert read_header(path).metadata["a.tokens"] == ["x", token]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "'a' needs a type"),
        ([1, "x"], "'a' needs a type"),
        ([1, True], "'a' needs a type"),
        ([[1], 2], "'a' needs a type"),
        (1 << 64, "'a' needs a type"),
        (None, "'a' needs a type"),
        (Typed(ValueType.U8, 256), "'a' cannot be written as U8"),
        (Typed(ValueType.U8, "x"), "'a' cannot be written as U8"),
        (Typed(ValueType.F32, 1e300), "'a' cannot be written as F32"),
        (Typed(ValueType.STRING, 3), "'a' cannot be written as STRING"),
        (Typed(ValueType.ARRAY, 3), "'a' cannot be written as ARRAY"),
        ("\ud800", "'a' cannot be written as STRING"),
    ],
)
def test_a_value_without_a_fitting_type_is_refused(
    value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "model.gguf", {"a": value}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (NewTensor("a", (2, 4), GgmlType.F32, lambda: bytes(31)), "has 31 bytes, but .* has 32"),
        (NewTensor("a", (2, 48), GgmlType.Q8_0, lambda: bytes(99)), "no multiple of Q8_0"),
        (NewTensor("a", (), GgmlType.F32, lambda: bytes(4)), "which no file can hold"),
        (NewTensor("a", (1,) * 5, GgmlType.F32, lambda: bytes(4)), "which no file can hold"),
        (NewTensor("a", (0, 4), GgmlType.F32, lambda: b""), "which no file can hold"),
        (NewTensor("a" * 256, (1,), GgmlType.F32, lambda: bytes(4)), "must have 1 to 255 bytes"),
        (NewTensor("norm.weight", (1,), GgmlType.F32, lambda: bytes(4)), "is there twice"),
    ],
)
def test_a_tensor_that_does_not_fit_leaves_the_old_file(
    tensor: NewTensor, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_gguf(path, {}, [*new_tensors(), tensor])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_alignment_that_no_reader_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"general\.alignment must be one of \[8, 16"):
        write_gguf(tmp_path / "model.gguf", {"general.alignment": 13}, [])


def test_one_tensor_is_read_at_a_time_and_in_order(tmp_path: Path) -> None:
    path, seen = tmp_path / "model.gguf", list[tuple[str, bool]]()

    def read(name: str) -> bytes:
        seen.append((name, path.exists()))
        return bytes(4)

    names = ["b", "a", "c"]
    write_gguf(path, {}, [NewTensor(n, (1,), GgmlType.F32, lambda n=n: read(n)) for n in names])
    assert seen == [(name, False) for name in names]
    assert path.exists()


def test_a_folder_that_is_not_there_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "model.gguf"
    with pytest.raises(ModelError, match=r"model\.gguf cannot be written"):
        write_gguf(path, {}, [])
