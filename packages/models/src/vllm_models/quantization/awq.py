"""AWQ checkpoints in the layout "gemm": 4 bit, packed along the outputs.

qweight int32 [K, O/8], qzeros int32 [K/G, O/8], scales [K/G, O]. The eight codes of a word are of
the columns 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.json_fields import JsonFields
from vllm_models.native.blocks import turn_awq
from vllm_models.native.library import library_for_blocks
from vllm_models.quantization.grouped import (
    SCALE_KINDS,
    Grouped,
    unpack_codes,
    word_bytes,
)
from vllm_models.quantization.parts import Format, Part, one_of

_WORDS = frozenset({"I32"})


def unpack_awq(words: Tensor) -> Tensor:
    """int32 [n, O/8] -> codes uint8 [O, n]."""
    return _by_column(unpack_codes(word_bytes(words), 4))


def repack_awq(words: Tensor) -> Tensor:
    """int32 [K, O/8] -> codes uint8 [O, K/2]."""
    library = library_for_blocks(words)
    return _turned(words) if library is None else turn_awq(library, words)


def _turned(words: Tensor) -> Tensor:
    """Two rows become one byte before they are moved."""
    stored = word_bytes(words)  # [K, O/2]
    even, odd = stored[::2], stored[1::2]
    low, high = (even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)
    return _by_column(torch.stack((low, high), -1).flatten(1))


def _by_column(stored: Tensor) -> Tensor:
    """uint8 [n, O] in the order of the words -> [O, n].

    A place in a word, in binary hbn, is of the column bnh.
    """
    rows = stored.T.contiguous().view(-1, 2, 2, 2, len(stored))
    return rows.permute(0, 2, 3, 1, 4).reshape(-1, len(stored))


@dataclass(frozen=True)
class Awq(Grouped):
    """4 bit with zero points."""

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """qweight, qzeros, scales."""
        rows, width = layer.rows(part), layer.parts[part]
        num_groups = layer.in_features // self.group_size

        def take_codes(words: Tensor) -> None:
            layer.codes[rows].copy_(repack_awq(words))

        def take_zeros(words: Tensor) -> None:
            layer.zeros[rows].copy_(unpack_awq(words))

        shape = (num_groups, width)
        return {
            "qweight": Place((layer.in_features, width // 8), _WORDS, take_codes),
            "qzeros": Place((num_groups, width // 8), _WORDS, take_zeros),
            "scales": Place(shape, SCALE_KINDS, lambda t: self.keep_scales(layer, rows, t.T)),
            **self.keep_bias(layer),
        }


@dataclass(frozen=True)
class AwqFormat(Format):
    """`quant_method` "awq".

    Attributes:
        group_size: -1 is the whole row.
    """

    group_size: int

    @classmethod
    def from_fields(cls, fields: JsonFields) -> AwqFormat:
        """Read the configuration.

        Raises:
            ModelError: It asks for something that is not supported.
        """
        bits = fields.get("bits", int, 0) or fields.get("w_bit", int, 4)
        one_of(fields, "bits", bits, (4,))
        saved_as = fields.get("version", str, "") or fields.get("format", str, "gemm")
        one_of(fields, "version", saved_as.lower(), ("gemm",))
        one_of(fields, "zero_point", fields.get("zero_point", bool, True), (True,))
        size = fields.get("group_size", int, 0) or fields.get("q_group_size", int, 128)
        one_of(fields, "group_size", size, (32, 64, 128, -1))
        return cls(size)

    def method(self, part: Part) -> LinearMethod | None:
        """Packed if any of the tensors of the format is there."""
        if not part.has("qweight", "qzeros", "scales"):
            return None
        part.check_multiple("out_features", part.out_features, 8, "the codes of a word")
        size = part.group_size(self.group_size)
        part.check_multiple("in_features", part.in_features, 2, "the codes of a byte")
        return Awq(4, size, part.scale_dtype("scales"))
