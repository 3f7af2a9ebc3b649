"""The blocks of a GGUF file in the form of the GPU's kernels, see `vllm_models.gpu.layout`.

Codes get a plane for their low and one for their high bits. Scales of scales stay apart, so that a
weight has the very numbers of the file and takes about as many bits. Bits of a weight here, and in
the file where they differ: Q2_K 3.13 (2.63), Q3_K 3.56 (3.44), Q4_K 4.63 (4.5), Q5_K 5.63 (5.5),
IQ4_XS 4.31 (4.25).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.gguf.dequantize import IQ4_VALUES, codes_in_runs, six_bit_scales
from vllm_models.gguf.types import GgmlType, block_bytes, block_size
from vllm_models.gpu.layout import Layout, Planes, interleave, run_for
from vllm_models.quantization.on_gpu import in_tiles


class _Form(NamedTuple):
    """How a type is laid out, but for the run, which depends on the width of a row."""

    number: str
    low_bits: int
    high_bits: int
    group: int
    center: int = 0
    scale: str = "number"
    offset: str = "none"


class _Parts(NamedTuple):
    """What N blocks hold: codes uint8 [N, block], others [N, groups or 1]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    factors: Tensor | None = None
    offset_factors: Tensor | None = None


def block_planes(blocks: Tensor, kind: GgmlType, columns: int) -> Planes:
    """The weight of blocks.

    Args:
        blocks: uint8 [R, bytes of a row].
        kind: How they are held, a quantized type.
        columns: Weights of a row.
    """
    form, split = _TYPES[kind]
    run = run_for(columns, form.group)
    layout = Layout(
        *(form.number, form.low_bits, form.high_bits, form.group, run),
        *(form.center, form.scale, form.offset),
    )
    table = torch.tensor(IQ4_VALUES, device=blocks.device).half()

    def make(some: slice) -> Planes:
        rows = some.stop - some.start
        held = blocks[some].reshape(rows * (columns // block_size(kind)), block_bytes(kind))
        parts = split(held)
        codes = parts.codes.reshape(rows, columns)
        low = codes & ((1 << form.low_bits) - 1)
        high = codes >> form.low_bits if form.high_bits else None
        return Planes(
            *(layout, rows, columns, interleave(low, form.low_bits, run)),
            None if high is None else interleave(high, form.high_bits, run),
            *(_by_group(values, rows) for values in parts[1:]),
            table=table if form.number == "table" else None,
        )

    return in_tiles(make, len(blocks), columns)


def _by_group(values: Tensor | None, rows: int) -> Tensor | None:
    """[N, groups of a block] -> [groups of a row, R]."""
    return None if values is None else values.reshape(rows, -1).T.contiguous()


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16)


def _with_bit(low: Tensor, low_run: int, high: Tensor, high_run: int) -> Tensor:
    return codes_in_runs(low, 4, low_run) | (codes_in_runs(high, 1, high_run) << 4)


def _q4_0(blocks: Tensor) -> _Parts:
    scale, codes = blocks.split([2, 16], -1)
    return _Parts(codes_in_runs(codes, 4, 16), _half(scale))


def _q4_1(blocks: Tensor) -> _Parts:
    scale, offset, codes = blocks.split([2, 2, 16], -1)
    return _Parts(codes_in_runs(codes, 4, 16), _half(scale), _half(offset))


def _q5_0(blocks: Tensor) -> _Parts:
    scale, high, low = blocks.split([2, 4, 16], -1)
    return _Parts(_with_bit(low, 16, high, 1), _half(scale))


def _q5_1(blocks: Tensor) -> _Parts:
    scale, offset, high, low = blocks.split([2, 2, 4, 16], -1)
    return _Parts(_with_bit(low, 16, high, 1), _half(scale), _half(offset))


def _q8_0(blocks: Tensor) -> _Parts:
    scale, codes = blocks.split([2, 32], -1)
    return _Parts(codes ^ 128, _half(scale))  # signed, and 128 more


def _q2_k(blocks: Tensor) -> _Parts:
    steps, codes, scale, minimum = blocks.split([16, 64, 2, 2], -1)
    return _Parts(codes_in_runs(codes, 2, 32), steps & 15, steps >> 4, _half(scale), _half(minimum))


def _q3_k(blocks: Tensor) -> _Parts:
    high, low, packed, scale = blocks.split([32, 64, 12, 2], -1)
    steps = codes_in_runs(packed[:, :8], 4, 8) | (codes_in_runs(packed[:, 8:], 2, 4) << 4)
    codes = codes_in_runs(low, 2, 32) | (codes_in_runs(high, 1, 32) << 2)
    return _Parts(codes, steps.view(torch.int8) - 32, factors=_half(scale))


def _q4_k(blocks: Tensor) -> _Parts:
    scale, minimum, packed, codes = blocks.split([2, 2, 12, 128], -1)
    steps, minima = six_bit_scales(packed)
    return _Parts(codes_in_runs(codes, 4, 32), steps, minima, _half(scale), _half(minimum))


def _q5_k(blocks: Tensor) -> _Parts:
    scale, minimum, packed, high, low = blocks.split([2, 2, 12, 32, 128], -1)
    steps, minima = six_bit_scales(packed)
    return _Parts(_with_bit(low, 32, high, 32), steps, minima, _half(scale), _half(minimum))


def _q6_k(blocks: Tensor) -> _Parts:
    low, high, steps, scale = blocks.split([128, 64, 16, 2], -1)
    codes = codes_in_runs(low, 4, 64) | (codes_in_runs(high, 2, 32) << 4)
    return _Parts(codes, steps.contiguous().view(torch.int8), factors=_half(scale))


def _iq4_xs(blocks: Tensor) -> _Parts:
    scale, high, low, places = blocks.split([2, 2, 4, 128], -1)
    steps = codes_in_runs(low, 4, 1) | (codes_in_runs(high, 2, 1) << 4)
    return _Parts(codes_in_runs(places, 4, 16), steps.view(torch.int8) - 32, factors=_half(scale))


def _mxfp4(blocks: Tensor) -> _Parts:
    exponent, places = blocks.split([1, 16], -1)
    return _Parts(codes_in_runs(places, 4, 16), exponent)


_TYPES: dict[GgmlType, tuple[_Form, Callable[[Tensor], _Parts]]] = {
    GgmlType.Q4_0: (_Form("integer", 4, 0, 32, 8), _q4_0),
    GgmlType.Q4_1: (_Form("integer", 4, 0, 32, 0, "number", "number"), _q4_1),
    GgmlType.Q5_0: (_Form("integer", 4, 1, 32, 16), _q5_0),
    GgmlType.Q5_1: (_Form("integer", 4, 1, 32, 0, "number", "number"), _q5_1),
    GgmlType.Q8_0: (_Form("integer", 8, 0, 32, 128), _q8_0),
    GgmlType.Q2_K: (_Form("integer", 2, 0, 16, 0, "step", "step"), _q2_k),
    GgmlType.Q3_K: (_Form("integer", 2, 1, 16, 4, "step"), _q3_k),
    GgmlType.Q4_K: (_Form("integer", 4, 0, 32, 0, "step", "step"), _q4_k),
    GgmlType.Q5_K: (_Form("integer", 4, 1, 32, 0, "step", "step"), _q5_k),
    GgmlType.Q6_K: (_Form("integer", 4, 2, 16, 32, "step"), _q6_k),
    GgmlType.IQ4_NL: (_Form("table", 4, 0, 32), _q4_0),
    GgmlType.IQ4_XS: (_Form("table", 4, 0, 32, 0, "step"), _iq4_xs),
    GgmlType.MXFP4: (_Form("e2m1", 4, 0, 32, 0, "exponent"), _mxfp4),
}
