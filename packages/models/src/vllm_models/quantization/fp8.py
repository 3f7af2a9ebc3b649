"""FP8 checkpoints: e4m3 weights with a scale per tensor, per row, or per block of rows and columns.

Held are the codes [O, K] and scales float32 [O, K / block columns], so that stacked parts need not
agree. Activations stay in the run-time type, also where the checkpoint has scales for them, except
where a GPU multiplies FP8, which chooses scales of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.linear import Linear, LinearMethod, Place
from vllm_models.gpu.launch import serves
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.grouped import SCALE_KINDS, check_finite
from vllm_models.quantization.on_gpu import GpuSegment, fp8_planes, keep_on_gpu
from vllm_models.quantization.parts import Format, Part, one_of
from vllm_models.quantization.tiles import Tiled

_SCALE_KINDS = SCALE_KINDS | {"F8_E8M0"}
_INPUT_SCALES = ("input_scale", "activation_scale")
_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
Blocks = tuple[int, int]  # rows and columns that share a scale


@dataclass(frozen=True)
class Fp8(Tiled):
    """e4m3 codes with float32 scales.

    Attributes:
        scale_suffix: What the checkpoint calls the scales.
        scale_shape: Of one part in the checkpoint, where O stands as -1.
        blocks: Rows and columns that share a scale; None is a scale per row or tensor.
        input_shape: Of the scale of activations, if there is one.
    """

    scale_suffix: str
    scale_shape: tuple[int, ...]
    blocks: Blocks | None = None
    input_shape: tuple[int, ...] = (1,)

    def create(self, layer: Linear) -> None:
        """Add `codes` and `scales`."""
        shape = (layer.out_features, layer.in_features)
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
        layer.codes = nn.Parameter(codes, requires_grad=False)
        columns = 1 if self.blocks is None else -(-layer.in_features // self.blocks[1])
        scales = torch.empty(layer.out_features, columns, dtype=torch.float32)
        layer.scales = nn.Parameter(scales, requires_grad=False)

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """weight, its scales, and scales of activations that are not used."""
        rows, width = layer.rows(part), layer.parts[part]
        ignored = {
            suffix: Place(self.input_shape, SCALE_KINDS, _ignore, optional=True)
            for suffix in _INPUT_SCALES
        }
        take_codes, take_scales = (
            partial(_take_codes, layer, rows),
            partial(self._take, layer, rows),
        )
        shape = (width, layer.in_features)
        return {
            "weight": Place(shape, frozenset({"F8_E4M3"}), take_codes),
            self.scale_suffix: Place(self._shape(layer, part), _SCALE_KINDS, take_scales),
            **ignored,
        }

    def _shape(self, layer: Linear, part: str) -> tuple[int, ...]:
        width = layer.parts[part]
        if self.blocks is not None:
            return (-(-width // self.blocks[0]), -(-layer.in_features // self.blocks[1]))
        return tuple(width if size == -1 else size for size in self.scale_shape)

    def _take(self, layer: Linear, rows: slice, stored: Tensor) -> None:
        if stored.dtype == torch.uint8:  # an exponent of 2, of which 255 is not a number
            stored = torch.where(stored == 255, torch.nan, (stored.float() - 127).exp2())
        scales = check_finite(stored.float())
        if self.blocks is not None:
            width = rows.stop - rows.start
            scales = scales.repeat_interleave(min(self.blocks[0], width), 0)[:width]
        else:
            scales = scales.reshape(-1, 1)
        layer.scales[rows].copy_(scales)

    def pack(self, layer: Linear) -> None:
        """Reorder for the GPU's kernels, if they compute."""
        if serves(layer.codes.device):
            size = None if self.blocks is None else self.blocks[1]
            planes = fp8_planes(layer.codes, layer.scales, size)
            whole = GpuSegment(slice(0, layer.out_features), None, planes)
            keep_on_gpu(layer, [whole], ("codes", "scales"))

    def tile(self, layer: Linear, rows: slice) -> Tensor:
        """codes * scales: [n, K] float32."""
        codes, scales = _numbers(layer.codes[rows]), layer.scales[rows]
        if self.blocks is not None:
            columns = layer.in_features
            scales = scales.repeat_interleave(min(self.blocks[1], columns), 1)[:, :columns]
        return codes.mul_(scales)


def _numbers(codes: Tensor) -> Tensor:
    """e4m3 -> float32, faster than torch does it on a CPU.

    The bits of a code, moved up by 7 behind the sign, are a half float that is 2**8 too small,
    because its exponent has a bias of 15 and not 7.
    """
    halves = (codes.view(torch.int8).short() << 7) & ~(1 << 14)
    return halves.view(torch.float16).float().mul_(256)


def _take_codes(layer: Linear, rows: slice, codes: Tensor) -> None:
    if int((codes.view(torch.uint8) & 0x7F).max()) == 0x7F:
        raise ValueError("holds values that are not numbers")
    layer.codes[rows].copy_(codes)


def _ignore(scale: Tensor) -> None:
    check_finite(scale)


def fp8_method(part: Part, blocks: Blocks | None) -> LinearMethod | None:
    """How a layer of a checkpoint with FP8 weights is held; None if it is not FP8.

    Args:
        part: The layer.
        blocks: Rows and columns that share a scale, if the configuration says so.

    Raises:
        ModelError: Its scales have a shape that is not known.
    """
    suffix = next((name for name in _WEIGHT_SCALES if part.has(name)), None)
    if part.kind("weight") not in ("F8_E4M3", "F8_E5M2") and suffix is None:
        return None
    inputs = [part.find(name) for name in _INPUT_SCALES]
    input_shape = () if any(found and found.shape == () for found in inputs) else (1,)
    suffix = suffix or _WEIGHT_SCALES[0 if blocks else 1]
    shape = () if blocks else _scale_shape(part, suffix)
    return Fp8(suffix, shape, blocks, input_shape)


def _scale_shape(part: Part, suffix: str) -> tuple[int, ...]:
    """One for the tensor or one per row, in any of the shapes in which they are saved."""
    rows, found = part.out_features, part.find(suffix)
    known = {(): (), (1,): (1,), (1, 1): (1, 1), (rows,): (-1,), (rows, 1): (-1, 1)}
    shape = (1,) if found is None else found.shape
    if shape not in known:
        raise ModelError(
            f"{part.name}.{suffix} is {list(shape)}, but must be one scale, or one per row of "
            f"{rows}."
        )
    return known[shape]


@dataclass(frozen=True)
class Fp8Format(Format):
    """`quant_method` "fp8".

    Attributes:
        blocks: Rows and columns that share a scale; None is a scale per row or tensor.
    """

    blocks: Blocks | None

    @classmethod
    def from_fields(cls, fields: JsonFields) -> Fp8Format:
        """Read the configuration.

        Raises:
            ModelError: It asks for something that is not supported.
        """
        one_of(fields, "fmt", fields.get("fmt", str, "e4m3"), ("e4m3", "float8_e4m3fn"))
        scheme = fields.get("activation_scheme", str, "dynamic")
        one_of(fields, "activation_scheme", scheme, ("dynamic", "static"))
        return cls(read_blocks(fields, "weight_block_size"))

    def method(self, part: Part) -> LinearMethod | None:
        """Packed if the weight is FP8 or has scales."""
        return fp8_method(part, self.blocks)


def read_blocks(fields: JsonFields, name: str) -> Blocks | None:
    """A pair of sizes, or None if there is none.

    Raises:
        ModelError: It is something else.
    """
    sizes = fields.get(name, list, [])
    if not sizes:
        return None
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise ModelError(f"{fields.source}: {name!r} is {sizes}, but must be two sizes.")
    return sizes[0], sizes[1]
