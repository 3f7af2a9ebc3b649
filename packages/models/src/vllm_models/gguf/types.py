"""The numbers of the GGUF format: types of tensors with the size of their blocks, types of values.

A block is the smallest unit of a row that is read alone: weights that share their scales.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class GgmlType(IntEnum):
    """How the weights of a tensor are held; those that this project reads."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    BF16 = 30
    MXFP4 = 39


class ValueType(IntEnum):
    """The type of a metadata value."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


class _Block(NamedTuple):
    size: int
    num_bytes: int


_BLOCKS = {
    GgmlType.F32: _Block(1, 4),
    GgmlType.F16: _Block(1, 2),
    GgmlType.Q4_0: _Block(32, 18),
    GgmlType.Q4_1: _Block(32, 20),
    GgmlType.Q5_0: _Block(32, 22),
    GgmlType.Q5_1: _Block(32, 24),
    GgmlType.Q8_0: _Block(32, 34),
    GgmlType.Q2_K: _Block(256, 84),
    GgmlType.Q3_K: _Block(256, 110),
    GgmlType.Q4_K: _Block(256, 144),
    GgmlType.Q5_K: _Block(256, 176),
    GgmlType.Q6_K: _Block(256, 210),
    GgmlType.IQ4_NL: _Block(32, 18),
    GgmlType.IQ4_XS: _Block(256, 136),
    GgmlType.I8: _Block(1, 1),
    GgmlType.I16: _Block(1, 2),
    GgmlType.I32: _Block(1, 4),
    GgmlType.I64: _Block(1, 8),
    GgmlType.F64: _Block(1, 8),
    GgmlType.BF16: _Block(1, 2),
    GgmlType.MXFP4: _Block(32, 17),
}

# Known by name only, so that a refusal can say what the file holds.
UNREADABLE_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}

# `struct` codes of the values that have one size.
NUMBER_CODES = {
    ValueType.U8: "B",
    ValueType.I8: "b",
    ValueType.U16: "H",
    ValueType.I16: "h",
    ValueType.U32: "I",
    ValueType.I32: "i",
    ValueType.F32: "f",
    ValueType.BOOL: "?",
    ValueType.U64: "Q",
    ValueType.I64: "q",
    ValueType.F64: "d",
}


def block_size(kind: GgmlType) -> int:
    """Weights in a block; 1 for plain numbers."""
    return _BLOCKS[kind].size


def block_bytes(kind: GgmlType) -> int:
    """Bytes of a block."""
    return _BLOCKS[kind].num_bytes


def row_bytes(kind: GgmlType, columns: int) -> int:
    """Bytes of a row.

    Raises:
        ValueError: The row is not a whole number of blocks.
    """
    size, num_bytes = _BLOCKS[kind]
    if columns % size:
        raise ValueError(
            f"A row of {columns} weights is no multiple of {kind.name} blocks ({size})."
        )
    return columns // size * num_bytes
