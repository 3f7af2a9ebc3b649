"""compressed-tensors checkpoints: integers packed in words, or FP8, by groups of layers.

pack-quantized: weight_packed int32 [O, K * bits / 32], weight_scale [O, K/G] or [O, 1],
weight_zero_point, weight_g_idx int32 [K], weight_shape. Codes and zero points are stored with
2**(bits - 1) added. float-quantized: weight in FP8 with weight_scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from vllm_traits import ModelError

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.fp8 import Blocks, fp8_method, read_blocks
from vllm_models.quantization.gptq import compiled
from vllm_models.quantization.grouped import SCALE_KINDS, Grouped, unpack_codes, word_bytes
from vllm_models.quantization.parts import Format, Part, one_of

_PACKED, _FLOAT = "pack-quantized", "float-quantized"
_CLASS = "Linear"


@dataclass(frozen=True)
class PackedIntegers(Grouped):
    """4 or 8 bit in words along the inputs.

    Attributes:
        scale_form: "tensor" is one for all, others are [O, K/G].
        zeros_packed: Zero points are packed in words too, not int8.
    """

    scale_form: str = "group"
    zeros_packed: bool = True

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """weight_packed, weight_scale, weight_zero_point, weight_g_idx, weight_shape."""
        rows, width = layer.rows(part), layer.parts[part]
        shape = (width, layer.in_features // self.group_size)
        words = frozenset({"I32"})

        def take_codes(packed: Tensor) -> None:
            layer.codes[rows].copy_(word_bytes(packed))

        def take_scales(scales: Tensor) -> None:
            self.keep_scales(layer, rows, scales)

        places = {
            "weight_packed": Place((width, layer.in_features * self.bits // 32), words, take_codes),
            "weight_scale": Place(
                (1,) if self.scale_form == "tensor" else shape, SCALE_KINDS, take_scales
            ),
            "weight_shape": _shape_place(width, layer.in_features),
        }
        if self.has_zeros:
            places["weight_zero_point"] = self._zeros_place(layer, rows, shape)
        if self.has_order:
            places["weight_g_idx"] = self.group_place(layer, part)
        return places

    def _zeros_place(self, layer: Linear, rows: slice, shape: tuple[int, int]) -> Place:
        if not self.zeros_packed:
            middle = 1 << (self.bits - 1)
            take = lambda zeros: layer.zeros[rows].copy_(_checked(zeros, middle) + middle)  # noqa: E731
            return Place(shape, frozenset({"I8"}), take)

        def take_words(words: Tensor) -> None:
            zeros = unpack_codes(word_bytes(words.T), self.bits)  # [K/G, O], perhaps padded
            layer.zeros[rows].copy_(zeros.T[: shape[0]])

        num_words = -(-shape[0] * self.bits // 32)
        return Place((num_words, shape[1]), frozenset({"I32"}), take_words)


def _checked(zeros: Tensor, middle: int) -> Tensor:
    if bool(((zeros < -middle) | (zeros >= middle)).any()):
        raise ValueError(f"holds zero points outside {-middle} .. {middle - 1}")
    return zeros.short()


def _shape_place(rows: int, columns: int) -> Place:
    def take(shape: Tensor) -> None:
        if shape.tolist() != [rows, columns]:
            raise ValueError(f"says {shape.tolist()}, but the layer is {[rows, columns]}")

    return Place((2,), frozenset({"I64", "I32"}), take, optional=True)


@dataclass(frozen=True)
class _Group:
    """How some layers are quantized.

    Attributes:
        targets: Names, patterns "re:...", or the class "Linear".
        is_float: FP8, else integers.
        bits: Of a code.
        group_size: Columns that share a scale; -1 is all.
        strategy: "group", "channel", "tensor" or "block".
        symmetric: There are no zero points.
        blocks: Of FP8 with a scale per block.
    """

    targets: tuple[str | re.Pattern[str], ...]
    is_float: bool
    bits: int
    group_size: int
    strategy: str
    symmetric: bool
    blocks: Blocks | None

    def method(self, part: Part) -> LinearMethod | None:
        """How a layer of the group is held."""
        if self.is_float:
            return fp8_method(part, self.blocks)
        per_word = 32 // self.bits
        part.check_multiple("in_features", part.in_features, per_word, "the codes of a word")
        return PackedIntegers(
            self.bits,
            part.group_size(self.group_size),
            part.scale_dtype("weight_scale"),
            has_zeros=not self.symmetric,
            has_order=part.has("weight_g_idx"),
            scale_form=self.strategy,
            zeros_packed=part.kind("weight_zero_point") != "I8",
        )


@dataclass(frozen=True)
class CompressedTensorsFormat(Format):
    """`quant_method` "compressed-tensors".

    Attributes:
        groups: In the order of the configuration.
        source: File and field, for messages.
    """

    groups: tuple[_Group, ...]
    source: str

    @classmethod
    def from_fields(cls, fields: JsonFields) -> CompressedTensorsFormat:
        """Read the configuration.

        Raises:
            ModelError: It asks for something that is not supported.
        """
        transform = fields.child("transform_config")
        if transform is not None and transform.values:
            raise ModelError(f"{fields.source}: 'transform_config' is not supported.")
        sparsity = fields.child("sparsity_config")
        if sparsity is not None and sparsity.values:
            one_of(sparsity, "format", sparsity.get("format", str, "dense"), ("dense",))
        groups = fields.child("config_groups")
        names = list(groups.values) if groups is not None else []
        usual = fields.get("format", str, "")
        children = [groups.child(name) for name in names] if groups is not None else []
        return cls(tuple(_group(child, usual) for child in children if child), fields.source)

    def method(self, part: Part) -> LinearMethod | None:
        """Packed if the tensors say so; the group says how."""
        is_float = part.kind("weight").startswith("F8_")
        if not (is_float or part.has("weight_packed", "weight_scale")):
            return None
        group = self._group_of(part.name)
        if group is None:
            raise ModelError(f"{self.source}: no group of 'config_groups' targets {part.name}.")
        return group.method(part)

    def _group_of(self, name: str) -> _Group | None:
        """By its own name, by a pattern, by the class; in this order."""
        ways = (
            lambda target: target == name,
            lambda target: isinstance(target, re.Pattern) and bool(target.match(name)),
            lambda target: target == _CLASS,
        )
        for way in ways:
            for group in self.groups:
                if any(way(target) for target in group.targets):
                    return group
        return None


def _group(fields: JsonFields, usual: str) -> _Group:
    saved_as = fields.get("format", str, "") or usual
    weights = fields.child("weights")
    if weights is None:
        raise ModelError(f"{fields.source} lacks the field 'weights'.")
    kind, bits = weights.get("type", str, "int"), weights.get("num_bits", int, 8)
    is_naive_float = saved_as == "naive-quantized" and kind == "float"
    one_of(fields, "format", _FLOAT if is_naive_float else saved_as, (_PACKED, _FLOAT))
    is_float = saved_as != _PACKED
    one_of(weights, "type", kind, ("float",) if is_float else ("int",))
    one_of(weights, "num_bits", bits, (8,) if is_float else (4, 8))
    strategy = weights.get("strategy", str, "") or _usual_strategy(weights)
    strategies = ("tensor", "channel", "block") if is_float else ("group", "channel", "tensor")
    one_of(weights, "strategy", strategy, strategies)
    _check_activations(fields, is_float)
    return _Group(
        tuple(_target(fields, target) for target in fields.need("targets", list)),
        is_float,
        bits,
        weights.positive("group_size") if strategy == "group" else -1,
        strategy,
        weights.get("symmetric", bool, True),
        _blocks(weights) if strategy == "block" else None,
    )


def _check_activations(fields: JsonFields, is_float: bool) -> None:
    """Scales of FP8 activations are left unused; others belong to another arithmetic."""
    for name in ("input_activations", "output_activations"):
        child = fields.child(name)
        if child is not None and not (is_float and name == "input_activations"):
            raise ModelError(f"{child.source}: quantized activations are not supported here.")


def _usual_strategy(weights: JsonFields) -> str:
    size = weights.get("group_size", int, 0)
    return "group" if size > 0 else "channel" if size == -1 else "tensor"


def _blocks(weights: JsonFields) -> Blocks:
    found = read_blocks(weights, "block_structure")
    if found is None:
        raise ModelError(f"{weights.source} lacks the field 'block_structure'.")
    return found


def _target(fields: JsonFields, target: object) -> str | re.Pattern[str]:
    if not isinstance(target, str):
        raise ModelError(f"{fields.source}: 'targets' holds {target!r}, but must hold names.")
    return compiled(fields, target[3:]) if target.startswith("re:") else target
