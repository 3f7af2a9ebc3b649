"""bitsandbytes 4-bit checkpoints (NF4 and FP4): codes of a table of 16 numbers, scaled in groups.

weight uint8 [O * K / 2, 1] with the earlier column in the high half, weight.absmax [O * K / G],
weight.quant_map [16], and weight.quant_state.bitsandbytes__nf4, JSON as bytes. Where the scales
are quantized again, absmax is uint8 and nested_quant_map[absmax] * nested_absmax + nested_offset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_traits import ModelError

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.gpu.layout import Planes
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.grouped import Grouped, check_finite, unpack_codes
from vllm_models.quantization.on_gpu import grouped_planes
from vllm_models.quantization.parts import Format, Part, one_of
from vllm_models.weights.saved import SavedTensor

_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_MAX_STATE_BYTES = 1 << 16
_FLOATS, _BYTES = frozenset({"F32"}), frozenset({"U8"})


@dataclass(frozen=True)
class Nested:
    """Scales that are quantized again.

    Attributes:
        group_size: Scales that share a scale.
        offset: Added to each.
    """

    group_size: int
    offset: float


@dataclass(frozen=True)
class TableCodes(Grouped):
    """4-bit codes of a table.

    Attributes:
        table: 16 numbers.
        state: Suffix of the tensor that describes the weight.
        state_bytes: Its size.
        nested: How the scales are quantized, if they are.
    """

    table: tuple[float, ...] = ()
    state: str = _STATES[0]
    state_bytes: int = 0
    nested: Nested | None = None

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """The weight and its many companions."""
        rows, width = layer.rows(part), layer.parts[part]
        num_codes = width * layer.in_features
        num_scales = num_codes // self.group_size

        def take_codes(stored: Tensor) -> None:
            swapped = (stored >> 4) | (stored << 4)
            layer.codes[rows].copy_(swapped.view(width, -1))

        def keep(scales: Tensor) -> None:
            self.keep_scales(layer, rows, scales.view(width, -1))

        scales = _Scales(keep, self.nested)
        return {
            "weight": Place((num_codes // 2, 1), _BYTES, take_codes),
            "weight.quant_map": Place((16,), _FLOATS, lambda _: None),
            self.state: Place((self.state_bytes,), _BYTES, lambda _: None),
            **scales.places(num_scales),
        }

    def fits_cpu(self, layer: Linear) -> bool:
        """Never: codes do not stand for themselves."""
        return False

    def planes(self, layer: Linear, rows: slice) -> Planes:
        """Some rows in the form of the GPU's kernels."""
        return grouped_planes(
            unpack_codes(layer.codes[rows], 4),
            layer.scales[rows],
            bits=4,
            group_size=self.group_size,
            table=self.table,
        )

    def tile(self, layer: Linear, rows: slice) -> Tensor:
        """table[codes] * scales: [n, K] float32."""
        table = torch.tensor(self.table, device=layer.codes.device)
        pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), -1)  # of a byte
        values = F.embedding(layer.codes[rows].int(), pairs)  # [n, K/2, 2]
        values = values.flatten(1).unflatten(-1, (-1, self.group_size))
        return values.mul_(layer.scales[rows].unsqueeze(-1)).flatten(1)


class _Scales:
    """The scales of one part, which can be computed when all that they are made of is there.

    Args:
        keep: Takes them, float32 [number].
        nested: How they are quantized, if they are.
    """

    def __init__(self, keep: Callable[[Tensor], None], nested: Nested | None) -> None:
        self._keep = keep
        self._nested = nested
        self._found: dict[str, Tensor] = {}

    def places(self, num_scales: int) -> dict[str, Place]:
        """Of the scales as the checkpoint has them."""
        if self._nested is None:
            return {"weight.absmax": Place((num_scales,), _FLOATS, self._keep)}
        num_nested = -(-num_scales // self._nested.group_size)
        places = {
            "absmax": Place((num_scales,), _BYTES, lambda t: self._take("codes", t)),
            "nested_absmax": Place((num_nested,), _FLOATS, lambda t: self._take("scales", t)),
            "nested_quant_map": Place((256,), _FLOATS, lambda t: self._take("table", t)),
        }
        return {f"weight.{suffix}": place for suffix, place in places.items()}

    def _take(self, name: str, values: Tensor) -> None:
        self._found[name] = check_finite(values.clone())
        if len(self._found) < 3 or self._nested is None:
            return
        codes = self._found["codes"].int()
        size = min(self._nested.group_size, len(codes))
        scales = self._found["scales"].repeat_interleave(size)[: len(codes)]
        self._keep(self._found["table"][codes] * scales + self._nested.offset)
        self._found.clear()


class BitsAndBytesFormat(Format):
    """`quant_method` "bitsandbytes" with 4 bit."""

    @classmethod
    def from_fields(cls, fields: JsonFields) -> BitsAndBytesFormat:
        """Read the configuration.

        Raises:
            ModelError: It asks for something that is not supported.
        """
        is_int8 = fields.get("load_in_8bit", bool, False) or fields.get(
            "_load_in_8bit", bool, False
        )
        if is_int8:
            raise ModelError(f"{fields.source}: bitsandbytes int8 is not supported (4 bit is).")
        return cls()

    def method(self, part: Part) -> LinearMethod | None:
        """Packed if the weight has a description."""
        name = next((name for name in _STATES if part.has(name)), None)
        found = part.find(name) if name is not None else None
        if name is None or found is None:
            return None
        state = _read_state(found)
        size = state.positive("blocksize", 64)
        if part.out_features * part.in_features % 2 or state.need("shape", list) != [
            part.out_features,
            part.in_features,
        ]:
            raise ModelError(
                f"{state.source}: 'shape' is {state.values.get('shape')}, but the layer is "
                f"{[part.out_features, part.in_features]}."
            )
        part.check_multiple("in_features", part.in_features, size, "its blocksize")
        return TableCodes(
            4,
            size,
            has_zeros=False,
            table=_read_table(part),
            state=name,
            state_bytes=found.shape[0],
            nested=_nested(state),
        )


def _read_state(saved: SavedTensor) -> JsonFields:
    source = f"{saved.source}: {saved.name}"
    if len(saved.shape) != 1 or saved.kind != "U8" or saved.num_bytes > _MAX_STATE_BYTES:
        raise ModelError(f"{source} is {saved.kind} {list(saved.shape)}, but must be a few bytes.")
    try:
        values = json.loads(bytes(saved.read().tolist()))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{source} holds {type(values).__name__}, but must hold an object.")
    return JsonFields(values, source)


def _read_table(part: Part) -> tuple[float, ...]:
    saved = part.find("weight.quant_map")
    if saved is None or saved.kind != "F32" or saved.shape != (16,):
        raise ModelError(f"{part.name}.weight.quant_map must be there, with 16 numbers in F32.")
    table = saved.read()
    if not bool(table.isfinite().all()):
        raise ModelError(f"{saved.source}: {saved.name} holds values that are not finite.")
    return tuple(table.tolist())


def _nested(state: JsonFields) -> Nested | None:
    if state.values.get("nested_blocksize") is None:
        return None
    one_of(state, "nested_dtype", state.get("nested_dtype", str, "float32"), ("float32",))
    return Nested(state.positive("nested_blocksize"), state.get("nested_offset", float, 0.0))
