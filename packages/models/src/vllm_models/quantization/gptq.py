"""GPTQ checkpoints: integers packed along the inputs, with a group of columns per scale.

qweight int32 [K * bits / 32, O], qzeros int32 [K/G, O * bits / 32], scales [K/G, O], and g_idx
int32 [K], the group of each column. Version 1 of the format stores the zero points less one, with
the borrow going through the word; version 2 as they are. Marlin's order is a third form, with
neither zero points nor g_idx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from vllm_traits import ModelError

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.grouped import (
    SCALE_KINDS,
    Grouped,
    pack_codes,
    unpack_codes,
    word_bytes,
)
from vllm_models.quantization.marlin import (
    CHUNK,
    TILE,
    unpack_marlin,
    unpack_marlin_scales,
)
from vllm_models.quantization.parts import Format, Part, one_of

_WORDS = frozenset({"I32"})
_ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Gptq(Grouped):
    """Versions 1 and 2.

    Attributes:
        zeros_less_one: Zero points are stored as in version 1.
        needs_order: g_idx must be there.
    """

    zeros_less_one: bool = True
    needs_order: bool = False

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """qweight, qzeros, scales, g_idx."""
        rows, width = layer.rows(part), layer.parts[part]
        num_groups, per_word = layer.in_features // self.group_size, 32 // self.bits

        def take_codes(words: Tensor) -> None:
            layer.codes[rows].copy_(word_bytes(words.T.contiguous()))

        def take_zeros(words: Tensor) -> None:
            words = words + _ONES[self.bits] if self.zeros_less_one else words
            layer.zeros[rows].copy_(unpack_codes(word_bytes(words), self.bits).T)

        shape = (num_groups, width)
        return {
            "qweight": Place((layer.in_features // per_word, width), _WORDS, take_codes),
            "qzeros": Place((num_groups, width // per_word), _WORDS, take_zeros),
            "scales": Place(shape, SCALE_KINDS, lambda t: self.keep_scales(layer, rows, t.T)),
            **(
                {"g_idx": self.group_place(layer, part, self.needs_order)} if self.has_order else {}
            ),
            **self.keep_bias(layer),
        }


@dataclass(frozen=True)
class Marlin(Grouped):
    """4 bit, symmetric, in the order of the Marlin kernel."""

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """B int32 [K/16, 2 * O], s [K/G, O]."""
        rows, width = layer.rows(part), layer.parts[part]

        def take_codes(words: Tensor) -> None:
            layer.codes[rows].copy_(pack_codes(unpack_marlin(words), 4))

        def take_scales(stored: Tensor) -> None:
            self.keep_scales(layer, rows, unpack_marlin_scales(stored))

        shape = (layer.in_features // self.group_size, width)
        return {
            "B": Place((layer.in_features // TILE, 2 * width), _WORDS, take_codes),
            "s": Place(shape, SCALE_KINDS, take_scales),
            **self.keep_bias(layer),
        }


@dataclass(frozen=True)
class GptqFormat(Format):
    """`quant_method` "gptq".

    Attributes:
        bits: Of a code.
        group_size: -1 is the whole row.
        desc_act: Columns were quantized, and grouped, by importance.
        checkpoint_format: "gptq", "gptq_v2" or "marlin".
        overrides: Patterns of layer names with other settings; None is not quantized.
    """

    bits: int
    group_size: int
    desc_act: bool
    checkpoint_format: str
    overrides: tuple[tuple[re.Pattern[str], JsonFields | None], ...] = ()

    @classmethod
    def from_fields(cls, fields: JsonFields) -> GptqFormat:
        """Read the configuration.

        Raises:
            ModelError: It asks for something that is not supported.
        """
        saved_as = fields.get("checkpoint_format", str, "") or fields.get("format", str, "gptq")
        if fields.get("is_marlin_format", bool, False):
            saved_as = "marlin"
        one_of(fields, "checkpoint_format", saved_as, ("gptq", "gptq_v2", "marlin"))
        packed_as = fields.get("pack_dtype", str, "int32").removeprefix("torch.")
        one_of(fields, "pack_dtype", packed_as, ("int32",))
        found = cls(
            fields.need("bits", int),
            fields.get("group_size", int, -1),
            fields.get("desc_act", bool, False),
            saved_as,
            _overrides(fields),
        )
        found._check(fields)
        return found

    def _check(self, fields: JsonFields) -> None:
        one_of(fields, "bits", self.bits, (4,) if self.checkpoint_format == "marlin" else (4, 8))
        if self.group_size < 1 and self.group_size != -1:
            raise ModelError(
                f"{fields.source}: 'group_size' is {self.group_size}, but must be -1 or at least 1."
            )

    def method(self, part: Part) -> LinearMethod | None:
        """Packed if any of the tensors of the format is there."""
        if not part.has("qweight", "qzeros", "scales", "B", "s"):
            return None
        for pattern, fields in self.overrides:
            if pattern.match(part.name) and fields is not None:
                return self._overridden(fields)._method(part)
        return self._method(part)

    def _overridden(self, fields: JsonFields) -> GptqFormat:
        found = replace(
            self,
            bits=fields.get("bits", int, self.bits),
            group_size=fields.get("group_size", int, self.group_size),
            desc_act=fields.get("desc_act", bool, self.desc_act),
        )
        found._check(fields)
        return found

    def _method(self, part: Part) -> LinearMethod:
        size = part.group_size(self.group_size)
        if self.checkpoint_format == "marlin":
            part.check_multiple("in_features", part.in_features, TILE, "a tile of Marlin")
            part.check_multiple("out_features", part.out_features, CHUNK, "four tiles of Marlin")
            return Marlin(4, size, part.scale_dtype("s"), has_zeros=False)
        per_word = 32 // self.bits
        part.check_multiple("in_features", part.in_features, per_word, "the codes of a word")
        part.check_multiple("out_features", part.out_features, per_word, "the codes of a word")
        return Gptq(
            self.bits,
            size,
            part.scale_dtype("scales"),
            has_order=self.desc_act or part.has("g_idx"),
            zeros_less_one=self.checkpoint_format == "gptq",
            needs_order=self.desc_act,
        )


def _overrides(fields: JsonFields) -> tuple[tuple[re.Pattern[str], JsonFields | None], ...]:
    """`dynamic`: "+:pattern" or "pattern" has settings of its own, "-:pattern" is left alone."""
    dynamic = fields.child("dynamic") or JsonFields({}, fields.source)
    found: list[tuple[re.Pattern[str], JsonFields | None]] = []
    for key in dynamic.values:
        pattern = compiled(fields, key.removeprefix("+:").removeprefix("-:"))
        found.append((pattern, None if key.startswith("-:") else dynamic.child(key)))
    return tuple(found)


def compiled(fields: JsonFields, pattern: str) -> re.Pattern[str]:
    """A pattern of layer names from a checkpoint."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{fields.source}: {pattern!r} is no pattern: {error}.") from error
