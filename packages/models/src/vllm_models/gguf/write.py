"""Writing a GGUF file: typed metadata, then tensors one at a time.

The file is there when it is complete, not before. Which keys and names a model needs is not known
here.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from vllm_traits import ModelError

from vllm_models.gguf.header import (
    ALIGNMENT_KEY,
    ALIGNMENTS,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_TENSOR_NAME_BYTES,
)
from vllm_models.gguf.types import NUMBER_CODES, GgmlType, ValueType, row_bytes
from vllm_models.gguf.values import Value

VERSION = 3


class Typed(NamedTuple):
    """A value whose type matters to readers, such as a token type, which must be I32.

    Attributes:
        type: Of the value, or of the items of a list; not ARRAY.
        value: A number, a string, or a list of them.
    """

    type: ValueType
    value: Value


class NewTensor(NamedTuple):
    """A tensor to write.

    Attributes:
        name: In the file.
        shape: Outermost dimension first.
        type: Of its blocks.
        read: Gives all bytes, row by row; called once, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    read: Callable[[], bytes | bytearray | memoryview]


Metadata: TypeAlias = Mapping[str, "Value | Typed"]


def write_gguf(path: Path, metadata: Metadata, tensors: Iterable[NewTensor]) -> None:
    """Write a whole file, holding one tensor at a time.

    Args:
        path: Replaced if it exists, once everything is written.
        metadata: Without a type, integers are U32, or else the first that fits of I32, U64 and
            I64; floats are F32. Integers in a list are I32, or else the first that fits of U32, I64
            and U64. `general.alignment` is obeyed.
        tensors: In the order of the file.

    Raises:
        ValueError: A value fits no type, a name is there twice, or data has another size than its
            shape says.
        ModelError: The file cannot be written.
    """
    wanted = list(tensors)
    alignment = _alignment(metadata)
    head = _header(metadata, wanted, alignment)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            file.write(head)
            for tensor in wanted:
                _write_data(file, tensor, alignment)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_data(file: BinaryIO, tensor: NewTensor, alignment: int) -> None:
    data, expected = memoryview(tensor.read()), _num_bytes(tensor)
    if data.nbytes != expected:
        raise ValueError(
            f"{tensor.name} has {data.nbytes} bytes, but {list(tensor.shape)} of "
            f"{tensor.type.name} has {expected}."
        )
    file.write(data)
    file.write(bytes(-expected % alignment))


def _alignment(metadata: Metadata) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    number = value.value if isinstance(value, Typed) else value
    if not isinstance(number, int) or number not in ALIGNMENTS:
        raise ValueError(f"{ALIGNMENT_KEY} must be one of {sorted(ALIGNMENTS)}, not {number}.")
    return number


def _header(metadata: Metadata, tensors: Sequence[NewTensor], alignment: int) -> bytes:
    """Everything before the data, to the aligned beginning of it."""
    counts = struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    found = bytearray(MAGIC + counts)
    for key, value in metadata.items():
        kind, raw = _value(key, value)
        found += _text(key) + struct.pack("<I", kind) + raw
    offset, names = 0, set[str]()
    for tensor in tensors:
        if tensor.name in names:
            raise ValueError(f"The tensor {tensor.name} is there twice.")
        names.add(tensor.name)
        found += _tensor_info(tensor, offset)
        offset += -(-_num_bytes(tensor) // alignment) * alignment
    return bytes(found) + bytes(-len(found) % alignment)


def _tensor_info(tensor: NewTensor, offset: int) -> bytes:
    name = _text(tensor.name)
    dimensions = len(tensor.shape)
    if not 1 <= dimensions <= MAX_DIMENSIONS or min(tensor.shape) < 1:
        raise ValueError(
            f"{tensor.name} has the shape {list(tensor.shape)}, which no file can hold."
        )
    if not 0 < len(name) - 8 <= MAX_TENSOR_NAME_BYTES:
        raise ValueError(f"{tensor.name!r} must have 1 to {MAX_TENSOR_NAME_BYTES} bytes.")
    layout = f"<I{dimensions}QIQ"
    return name + struct.pack(layout, dimensions, *reversed(tensor.shape), tensor.type, offset)


def _num_bytes(tensor: NewTensor) -> int:
    return math.prod(tensor.shape[:-1]) * row_bytes(tensor.type, tensor.shape[-1])


def _text(content: str) -> bytes:
    raw = content.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Value | Typed) -> tuple[ValueType, bytes]:
    """The type and the bytes of a metadata value."""
    kind = None
    if isinstance(value, Typed):
        kind, value = value
    if isinstance(value, list):
        return ValueType.ARRAY, _array(key, value, kind)
    kind = _type_of(key, [value], _INTEGERS) if kind is None else kind
    return kind, _items(key, kind, [value])


def _array(key: str, items: list[Value], kind: ValueType | None) -> bytes:
    if kind is None and items and all(isinstance(item, list) for item in items):
        inner = [_array(key, item, None) for item in items if isinstance(item, list)]
        return struct.pack("<IQ", ValueType.ARRAY, len(items)) + b"".join(inner)
    kind = _type_of(key, items, _INTEGERS_IN_LISTS) if kind is None else kind
    return struct.pack("<IQ", kind, len(items)) + _items(key, kind, items)


def _items(key: str, kind: ValueType, items: list[Value]) -> bytes:
    try:
        if kind is ValueType.STRING:
            return b"".join(_text(item) for item in items)  # type: ignore[arg-type]
        return struct.pack(f"<{len(items)}{NUMBER_CODES[kind]}", *items)
    except (KeyError, AttributeError, OverflowError, struct.error, UnicodeError) as error:
        raise ValueError(f"{key!r} cannot be written as {kind.name}: {error}.") from error


_INTEGERS = (ValueType.U32, ValueType.I32, ValueType.U64, ValueType.I64)
_INTEGERS_IN_LISTS = (ValueType.I32, ValueType.U32, ValueType.I64, ValueType.U64)
_RANGES = {
    ValueType.U32: range(1 << 32),
    ValueType.I32: range(-(1 << 31), 1 << 31),
    ValueType.U64: range(1 << 64),
    ValueType.I64: range(-(1 << 63), 1 << 63),
}


def _type_of(key: str, items: Sequence[Value], integers: Sequence[ValueType]) -> ValueType:
    """The one type that all items have."""
    kinds = {type(item) for item in items}
    if kinds == {bool}:
        return ValueType.BOOL
    if kinds == {str}:
        return ValueType.STRING
    if kinds == {float} or kinds == {float, int}:
        return ValueType.F32
    numbers = [item for item in items if isinstance(item, int)]
    if kinds == {int}:
        for kind in integers:
            if min(numbers) in _RANGES[kind] and max(numbers) in _RANGES[kind]:
                return kind
    raise ValueError(f"{key!r} needs a type: its items have no single one that fits.")
