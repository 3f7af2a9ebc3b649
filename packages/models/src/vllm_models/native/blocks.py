"""Quantized weights: GGUF blocks, or codes with a scale and a zero per group, repacked for the
kernel (formats.h says how).

Activations are quantized to int8 with a scale for 256 columns, which groups of 32 halve as often as
they fit, so results differ from those of the dequantized weight by that rounding alone. A row's
result does not depend on the other rows, on the number of threads, or on how weights are stacked.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_models.native.library import Library
from vllm_models.native.packed import PackedWeight, address, zeros

# By the names that GGUF uses, with its numbers.
BLOCK_TYPES = {
    **{"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8},
    **{"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14},
    **{"IQ4_NL": 20, "IQ4_XS": 23, "MXFP4": 39},
}
_GROUPED = {4: 104, 8: 108}  # by bits
SPANS = (32, 64, 128)  # columns that may share a scale
GROUP = 32  # columns of a weight that share one, or of activations that a power of two multiplies
_PIECE = 256  # columns of activations that share a scale
_MOST_HALVINGS = 20


class _Weight(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("span", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class PackedBlocks(PackedWeight):
    """One or more quantized weights with the same columns, which one call multiplies.

    Their results stand side by side, in the order of the weights.
    """

    def __init__(self, library: Library, parts: Sequence[tuple[_Weight, Tensor]]) -> None:
        self.library = library
        self._linear = library.blocks_linear
        self._parts = tuple(parts)
        self.columns: int = parts[0][0].columns
        self.outputs = sum(weight.outputs for weight, _ in parts)
        self._weights = (_Weight * len(parts))(*(weight for weight, _ in parts))
        offset = 0
        for weight in self._weights:
            assert weight.columns == self.columns, "stacked weights have the same columns"
            weight.offset = offset
            offset += weight.outputs
        self._arguments = (address(self._weights), len(parts))

    @property
    def weights(self) -> list[_Weight]:
        """What the kernels are told of each."""
        return list(self._weights)

    @property
    def data(self) -> Tensor:
        """The memory of the only weight, uint8."""
        [(_, data)] = self._parts
        return data

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(data.numel() for _, data in self._parts)

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight as numbers: [T] int64 -> [T, columns] float32."""
        assert len(self._parts) == 1, "rows of one weight, not of a stack"
        rows = rows.contiguous()
        out = torch.empty((len(rows), self.columns))
        self.library.blocks_gather(self._arguments[0], rows.data_ptr(), len(rows), out.data_ptr())
        return out

    def dequantize(self) -> Tensor:
        """The weights as numbers: [outputs, columns] float32."""
        whole = [PackedBlocks(self.library, [part]) for part in self._parts]
        return torch.cat([part.gather(torch.arange(part.outputs)) for part in whole])


def stack(parts: Sequence[PackedBlocks]) -> PackedBlocks:
    """Several weights as one; formats may differ. They share their memory with the parts."""
    together = [single for part in parts for single in part._parts]
    return PackedBlocks(parts[0].library, together)


def pack_blocks(library: Library, blocks: Tensor, kind: str, columns: int) -> PackedBlocks:
    """Repack blocks of a GGUF file.

    Args:
        library: The kernels.
        blocks: [outputs, bytes per row] uint8; not needed afterwards.
        kind: One of BLOCK_TYPES.
        columns: Weights per row, whole blocks.
    """
    weight, data = _empty(library, (len(blocks), columns), BLOCK_TYPES[kind], 0, 0)
    blocks = blocks.contiguous()
    library.blocks_pack(address(weight), blocks.data_ptr())
    return PackedBlocks(library, [(weight, data)])


def fits_groups(columns: int, group_size: int) -> bool:
    """Whether groups of so many columns can be packed: of a multiple of 32, or the whole row."""
    return group_size == columns or group_size % GROUP == 0


def keeps_scales(scales: Tensor) -> bool:
    """Whether `pack_grouped` rounds them by 2**-11 of themselves at most: [outputs, G] -> bool."""
    if scales.dtype != torch.float32:
        return True
    error = (_short(scales).float() - scales).abs()
    return bool((error <= scales.abs() * 2.0**-11).all())


def pack_grouped(
    library: Library, codes: Tensor, scales: Tensor, zero_points: Tensor, bits: int
) -> PackedBlocks:
    """Pack codes with a scale and a zero per group: weight = scale * (code - zero).

    Args:
        library: The kernels.
        codes: uint8 [outputs, columns] of 8 bits, or [outputs, columns / 2] of 4, the even columns
            in the low halves; signed codes are given with their zero added.
        scales: [outputs, G] float16, bfloat16, or float32, which is rounded to float16 unless
            bfloat16 holds it; `fits_groups` says which columns / G can be.
        zero_points: [outputs, G]; integers, or what float16 holds exactly.
        bits: 4 or 8.
    """
    columns = codes.shape[1] * 8 // bits
    scales = _short(scales)
    scales, zero_points, span = _spread(scales, zero_points, columns)
    kind = 1 if scales.dtype == torch.bfloat16 else 0
    weight, data = _empty(library, (len(codes), columns), _GROUPED[bits], span, kind)
    kept = (codes.contiguous(), scales.contiguous(), zero_points.to(torch.float16).contiguous())
    library.grouped_pack(address(weight), *(tensor.data_ptr() for tensor in kept))
    return PackedBlocks(library, [(weight, data)])


def turn_awq(library: Library, words: Tensor) -> Tensor:
    """Codes of an AWQ checkpoint, int32 [K, O/8], as `pack_grouped` wants them: uint8 [O, K/2]."""
    columns, outputs = len(words), words.shape[1] * 8
    words, out = words.contiguous(), torch.empty((outputs, columns // 2), dtype=torch.uint8)
    library.awq_turn(words.data_ptr(), columns, outputs, out.data_ptr())
    return out


def _short(scales: Tensor) -> Tensor:
    """Scales of 16 bits."""
    if scales.dtype != torch.float32:
        return scales
    brief = scales.bfloat16()
    return brief if torch.equal(brief.float(), scales) else scales.half()


def _spread(scales: Tensor, zero_points: Tensor, columns: int) -> tuple[Tensor, Tensor, int]:
    """Repeat the scales of groups, so that each stands for one of SPANS."""
    size = -(-columns // scales.shape[1])
    assert fits_groups(columns, size), f"groups of {size} columns"
    span = 128 if scales.shape[1] == 1 and size not in SPANS else math.gcd(size, 128)
    times = -(-size // span)
    return scales.repeat_interleave(times, 1), zero_points.repeat_interleave(times, 1), span


def _empty(
    library: Library, shape: tuple[int, int], number: int, span: int, kind: int
) -> tuple[_Weight, Tensor]:
    weight = _Weight(None, *shape, number, 0, span or 128, kind)
    data = zeros(library.blocks_bytes(address(weight)))
    weight.data = data.data_ptr()
    return weight, data


def reference(packed: PackedBlocks, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The textbook form: round the activations, multiply the dequantized weights in float64."""
    y = round_activations(x).double() @ packed.dequantize().double().T
    return y if bias is None else y + bias


def round_activations(x: Tensor) -> Tensor:
    """x [M, K] in float32 as its int8 codes stand for it."""
    width = x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, -width % _PIECE))
    groups = padded.unflatten(1, (-1, _PIECE // GROUP, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    limit = largest.amax(-2, keepdim=True)
    doublings = (limit.view(torch.int32) - largest.view(torch.int32)) >> 23
    power = ((127 + doublings.clamp(max=_MOST_HALVINGS)) << 23).view(torch.float32)
    inverse = torch.where(limit > 1e-30, 127.0 / limit, 0.0)
    rounded = (groups * (inverse * power)).round() * (limit / 127.0) / power
    return rounded.flatten(1)[:, :width]
