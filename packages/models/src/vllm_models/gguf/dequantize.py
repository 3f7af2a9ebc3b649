"""The weights that GGUF blocks stand for: the reference of every kernel that multiplies by blocks.

A weight is `scale * code + offset`, where groups of neighbours share scale and offset. Codes below
8 bits are packed in runs: byte `i` of a run of `n` bytes has the codes `i`, `n + i`, `2n + i`, ...
from its lowest bits on. How blocks are made from weights is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.gguf.types import GgmlType, block_bytes, block_size

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of 4-bit floats (E2M1), for scales that are halved.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Unpacked(NamedTuple):
    """N blocks as groups; a weight is `scale * code + offset` in float32.

    Attributes:
        scale: float32 [N, groups, 1].
        codes: int8 or uint8 [N, groups, weights of a group].
        offset: float32 [N, groups, 1], or None for zero.
    """

    scale: Tensor
    codes: Tensor
    offset: Tensor | None = None


def dequantize(blocks: Tensor, kind: GgmlType, columns: int) -> Tensor:
    """The weights as float32 [R, columns], bit for bit those of the reference of the format.

    Args:
        blocks: uint8 [R, bytes of a row].
        kind: How they are held.
        columns: Weights of a row, a multiple of the size of a block.

    Raises:
        ValueError: Integers are no weights.
    """
    if kind in _FLOATS:
        return _floats(blocks, _FLOATS[kind]).float()
    num_blocks = len(blocks) * columns // block_size(kind)
    found = unpack(blocks.reshape(num_blocks, block_bytes(kind)), kind)
    weights = found.codes.float().mul_(found.scale)
    if found.offset is not None:
        weights.add_(found.offset)
    return weights.view(len(blocks), columns)


def unpack(blocks: Tensor, kind: GgmlType) -> Unpacked:
    """Codes and scales of single blocks.

    Args:
        blocks: uint8 [N, bytes of a block].
        kind: A quantized type.

    Raises:
        ValueError: The type has no blocks.
    """
    if kind not in _UNPACK:
        raise ValueError(f"{kind.name} is not a quantized type.")
    return _UNPACK[kind](blocks)


def codes_in_runs(packed: Tensor, bits: int, run: int) -> Tensor:
    """Codes that are packed in runs, in the order of the weights.

    Args:
        packed: uint8 [N, bytes].
        bits: Of a code: 1, 2 or 4.
        run: Bytes of a run.

    Returns:
        uint8 [N, 8 / bits * bytes].
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = packed.unflatten(-1, (-1, 1, run)) >> shifts[:, None]  # [N, runs, 8 / bits, run]
    return codes.bitwise_and_((1 << bits) - 1).flatten(1)


def six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of Q4_K and Q5_K.

    Bytes 0-3 begin with scales 0-3 and bytes 4-7 with minima 0-3, six bits each; their upper two
    bits are those of scales and minima 4-7, whose lower four share bytes 8-11.

    Args:
        packed: uint8 [N, 12].

    Returns:
        Two of uint8 [N, 8].
    """
    first, second, low = packed.split(4, -1)
    scales = torch.cat([first & 63, (low & 15) | (first >> 6 << 4)], -1)
    minima = torch.cat([second & 63, (low >> 4) | (second >> 6 << 4)], -1)
    return scales, minima


def _floats(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [N, bytes] as numbers [N, bytes / size], which torch wants at multiples of the size."""
    flat = raw.reshape(-1)
    if flat.storage_offset() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(len(raw), raw.shape[-1] // dtype.itemsize)


def _half(two_bytes: Tensor) -> Tensor:
    """Numbers saved as f16: [N, 2] -> float32 [N, 1]."""
    return _floats(two_bytes, torch.float16).float()


def _grouped(scale: Tensor, codes: Tensor, offset: Tensor | None = None) -> Unpacked:
    """From scales and offsets [N, groups] and codes [N, weights of a block]."""
    codes = codes.unflatten(-1, (scale.shape[-1], -1))
    return Unpacked(scale[..., None], codes, None if offset is None else offset[..., None])


def _looked_up(values: tuple[int, ...], codes: Tensor) -> Tensor:
    table = torch.tensor(values, dtype=torch.int8, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)


def _q4_0(blocks: Tensor) -> Unpacked:
    """Scale f16 | 16 bytes of codes."""
    scale, codes = blocks.split([2, 16], -1)
    return _grouped(_half(scale), codes_in_runs(codes, 4, 16).view(torch.int8) - 8)


def _q4_1(blocks: Tensor) -> Unpacked:
    """Scale f16 | offset f16 | 16 bytes of codes."""
    scale, offset, codes = blocks.split([2, 2, 16], -1)
    return _grouped(_half(scale), codes_in_runs(codes, 4, 16), _half(offset))


def _q5_0(blocks: Tensor) -> Unpacked:
    """Scale f16 | 4 bytes of fifth bits, in order | 16 bytes of codes."""
    scale, high, low = blocks.split([2, 4, 16], -1)
    return _grouped(_half(scale), _five_bits(low, 16, high, 1).view(torch.int8) - 16)


def _q5_1(blocks: Tensor) -> Unpacked:
    """Scale f16 | offset f16 | 4 bytes of fifth bits, in order | 16 bytes of codes."""
    scale, offset, high, low = blocks.split([2, 2, 4, 16], -1)
    return _grouped(_half(scale), _five_bits(low, 16, high, 1), _half(offset))


def _five_bits(low: Tensor, low_run: int, high: Tensor, high_run: int) -> Tensor:
    return codes_in_runs(low, 4, low_run) | (codes_in_runs(high, 1, high_run) << 4)


def _q8_0(blocks: Tensor) -> Unpacked:
    """Scale f16 | 32 codes."""
    scale, codes = blocks.split([2, 32], -1)
    return _grouped(_half(scale), codes.view(torch.int8))


def _q2_k(blocks: Tensor) -> Unpacked:
    """16 bytes, each scale and minimum of 16 weights | 64 bytes of codes | two f16 for those."""
    steps, codes, scale, minimum = blocks.split([16, 64, 2, 2], -1)
    scales = _half(scale) * (steps & 15).float()  # [N, 16]
    minima = _half(minimum) * (steps >> 4).float()
    return _grouped(scales, codes_in_runs(codes, 2, 32), -minima)


def _q3_k(blocks: Tensor) -> Unpacked:
    """32 bytes of third bits | 64 bytes of codes | 12 bytes, 16 scales of six bits | f16 for those.

    A third bit that is not set takes 4 from its code.
    """
    high, low, packed, scale = blocks.split([32, 64, 12, 2], -1)
    steps = codes_in_runs(packed[:, :8], 4, 8) | (codes_in_runs(packed[:, 8:], 2, 4) << 4)
    scales = _half(scale) * (steps.view(torch.int8) - 32).float()  # [N, 16]
    codes = codes_in_runs(low, 2, 32) | (codes_in_runs(high, 1, 32) << 2)
    return _grouped(scales, codes.view(torch.int8) - 4)


def _q4_k(blocks: Tensor) -> Unpacked:
    """Two f16 | 12 bytes of scales and minima of 32 weights for those | 128 bytes of codes."""
    scale, minimum, packed, codes = blocks.split([2, 2, 12, 128], -1)
    steps, minima = six_bit_scales(packed)
    return _grouped(
        _half(scale) * steps.float(),  # [N, 8]
        codes_in_runs(codes, 4, 32),
        -(_half(minimum) * minima.float()),
    )


def _q5_k(blocks: Tensor) -> Unpacked:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    scale, minimum, packed, high, low = blocks.split([2, 2, 12, 32, 128], -1)
    steps, minima = six_bit_scales(packed)
    return _grouped(
        _half(scale) * steps.float(),  # [N, 8]
        _five_bits(low, 32, high, 32),
        -(_half(minimum) * minima.float()),
    )


def _q6_k(blocks: Tensor) -> Unpacked:
    """128 bytes of low bits | 64 bytes of high bits | 16 signed scales of 16 weights | f16."""
    low, high, steps, scale = blocks.split([128, 64, 16, 2], -1)
    codes = codes_in_runs(low, 4, 64) | (codes_in_runs(high, 2, 32) << 4)
    scales = _half(scale) * steps.view(torch.int8).float()  # [N, 16]
    return _grouped(scales, codes.view(torch.int8) - 32)


def _iq4_nl(blocks: Tensor) -> Unpacked:
    """Scale f16 | 16 bytes of places in a table."""
    scale, places = blocks.split([2, 16], -1)
    return _grouped(_half(scale), _looked_up(IQ4_VALUES, codes_in_runs(places, 4, 16)))


def _iq4_xs(blocks: Tensor) -> Unpacked:
    """Scale f16 | 2 and 4 bytes, high and low bits of 8 scales | 128 bytes of places in a table."""
    scale, high, low, places = blocks.split([2, 2, 4, 128], -1)
    steps = codes_in_runs(low, 4, 1) | (codes_in_runs(high, 2, 1) << 4)
    scales = _half(scale) * (steps.view(torch.int8) - 32).float()  # [N, 8]
    return _grouped(scales, _looked_up(IQ4_VALUES, codes_in_runs(places, 4, 16)))


def _mxfp4(blocks: Tensor) -> Unpacked:
    """Exponent of the scale, 127 for one | 16 bytes of 4-bit floats."""
    exponent, places = blocks.split([1, 16], -1)
    # Half the scale, whose values are doubled: the smallest two are no normal numbers.
    wide = exponent.int()
    bits = torch.where(wide < 2, 0x200000 << wide, (wide - 1) << 23)
    codes = _looked_up(MXFP4_VALUES, codes_in_runs(places, 4, 16))
    return _grouped(bits.view(torch.float32), codes)


_FLOATS = {
    GgmlType.F64: torch.float64,
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}
_UNPACK: dict[GgmlType, Callable[[Tensor], Unpacked]] = {
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q5_0: _q5_0,
    GgmlType.Q5_1: _q5_1,
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q2_K: _q2_k,
    GgmlType.Q3_K: _q3_k,
    GgmlType.Q4_K: _q4_k,
    GgmlType.Q5_K: _q5_k,
    GgmlType.Q6_K: _q6_k,
    GgmlType.IQ4_NL: _iq4_nl,
    GgmlType.IQ4_XS: _iq4_xs,
    GgmlType.MXFP4: _mxfp4,
}
QUANTIZED_TYPES = frozenset(_UNPACK)
