"""Weights in the form of the GPU's kernels, see `vllm_models.gpu.layout`, and their products.

Knows how integers with scales get there; what a format's own bytes mean is told by its file.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Linear
from vllm_models.gpu.launch import kernels_for
from vllm_models.gpu.layout import Layout, Planes, interleave, run_for, stack_planes

_TILE_ELEMENTS = 1 << 26  # of which there are copies while they are reordered


class GpuSegment(NamedTuple):
    """Some rows of a layer.

    Attributes:
        rows: Of the layer.
        order: Column c = order[k] is held as k; None is as they come.
        planes: Their weights.
    """

    rows: slice
    order: Tensor | None
    planes: Planes


class GpuWeight:
    """Implements `Packed`.

    Args:
        layer: Says whether the order of sums is fixed; not kept alive.
        segments: From the first row of the weight to its last.
    """

    def __init__(self, layer: Linear, segments: Sequence[GpuSegment]) -> None:
        self._layer = weakref.ref(layer)
        self.segments = tuple(segments)

    def move(self, planes: Sequence[Planes]) -> None:
        """Hold the same weights in other memory, such as a part of all experts' together."""
        layer, pairs = self._layer(), zip(self.segments, planes, strict=True)
        assert layer is not None, "weights of a layer that is gone"
        keep_on_gpu(layer, [segment._replace(planes=own) for segment, own in pairs], ())

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] -> [T, O], in the element type of x."""
        kernels, layer = _kernels(x), self._layer()
        assert layer is not None, "a product with a layer that is gone"
        out = x.new_empty(len(x), self.segments[-1].rows.stop)
        for rows, order, planes in self.segments:
            is_fp8 = planes.layout.number == "e4m3"
            multiply = kernels.fp8_matmul if is_fp8 else kernels.grouped_matmul
            ordered = x if order is None else x.index_select(1, order)
            some = None if bias is None else bias[rows]
            multiply(ordered, planes, some, out[:, rows], layer.fixed_order)
        return out

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight: [T] -> [T, K] float32."""
        [(_, order, planes)] = self.segments
        found = _kernels(rows).gather_rows(planes, rows)
        return found if order is None else found.index_select(1, order.argsort())

    def dequantize(self) -> Tensor:
        """[O, K] float32."""
        parts: list[Tensor] = []
        for _, order, planes in self.segments:
            whole = slice(0, planes.rows)
            held = _kernels(planes.low).dequantize(planes, whole, torch.float32)
            parts.append(held if order is None else held[:, order.argsort()])
        return torch.cat(parts)


def _kernels(x: Tensor) -> ModuleType:
    kernels = kernels_for(x)
    assert kernels is not None, "packed for kernels that are gone"
    return kernels


def keep_on_gpu(layer: Linear, segments: Sequence[GpuSegment], replaced: Sequence[str]) -> None:
    """Hold the weight in the form of the kernels from now on.

    Args:
        layer: Gets a parameter for every tensor of the segments.
        segments: Its weight.
        replaced: Parameters that it no longer needs.
    """
    for name in replaced:
        delattr(layer, name)
    for index, segment in enumerate(segments):
        for name, tensor in segment.planes._asdict().items():
            if isinstance(tensor, Tensor):
                setattr(layer, f"{name}_{index}", nn.Parameter(tensor, requires_grad=False))
    layer.packed = GpuWeight(getattr(layer, "whole", layer), segments)


def in_tiles(make: Callable[[slice], Planes], rows: int, columns: int) -> Planes:
    """The planes of a weight, made some rows at a time so that copies stay small."""
    step = max(1, _TILE_ELEMENTS // columns)
    firsts = range(0, rows, step)
    return stack_planes([make(slice(first, min(first + step, rows))) for first in firsts])


def grouped_planes(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    table: Sequence[float] | None = None,
) -> Planes:
    """From codes with a scale per group.

    Args:
        codes: uint8 [N, K].
        scales: [N, K / G].
        zeros: uint8 [N, K / G], absent for the middle.
        bits: 4 or 8.
        group_size: G.
        table: What codes stand for, if not for themselves.
    """
    rows, columns = codes.shape
    group = _whole_runs(group_size, columns)
    run = run_for(columns, group)
    layout = Layout(
        "integer" if table is None else "table",
        *(bits, 0, group, run),
        center=1 << (bits - 1) if table is None and zeros is None else 0,
        offset="none" if zeros is None else "zero",
    )

    def make(some: slice) -> Planes:
        return Planes(
            *(layout, some.stop - some.start, columns),
            low=interleave(codes[some], bits, run),
            high=None,
            scales=_by_group(scales[some]),
            offsets=None if zeros is None else _by_group(zeros[some]),
            table=None if table is None else torch.tensor(table, device=codes.device).half(),
        )

    return in_tiles(make, rows, columns)


def fp8_planes(codes: Tensor, scales: Tensor, group_size: int | None) -> Planes:
    """From e4m3 codes, which stay where they are.

    Args:
        codes: [N, K].
        scales: float32 [N, groups].
        group_size: Columns of a group, of which the last may have fewer; None is a whole row.
    """
    rows, columns = codes.shape
    group = _whole_runs(group_size or columns, columns)
    layout = Layout("e4m3", 8, 0, group, run_for(columns, group))
    return Planes(layout, rows, columns, codes.view(torch.uint8), None, _by_group(scales))


def _whole_runs(group_size: int, columns: int) -> int:
    """A group that is a whole row may end behind it, where it is a multiple of every run."""
    return group_size if group_size < columns else -(-columns // 256) * 256


def _by_group(values: Tensor) -> Tensor:
    """[N, groups] -> [groups, N]."""
    return values.T.contiguous()
