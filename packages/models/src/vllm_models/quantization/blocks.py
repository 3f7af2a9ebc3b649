"""Weights as the blocks of a GGUF file, which stay as they are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Dense, Linear, LinearMethod, Place
from vllm_models.gguf.dequantize import dequantize
from vllm_models.gguf.types import GgmlType, block_size, row_bytes
from vllm_models.gpu.launch import serves
from vllm_models.native.blocks import PackedBlocks, pack_blocks, stack
from vllm_models.native.library import library_for_blocks
from vllm_models.quantization.block_planes import block_planes
from vllm_models.quantization.on_gpu import GpuSegment, keep_on_gpu
from vllm_models.quantization.separate import Separate
from vllm_models.quantization.tiles import Tiled
from vllm_models.weights.saved import SavedTensor

BLOCK_KINDS = {kind.name: kind for kind in GgmlType if block_size(kind) > 1}


class Segment(NamedTuple):
    """Neighbouring parts of a layer whose blocks have one type and are one parameter.

    Attributes:
        name: Of the parameter, uint8 [rows, bytes per row].
        kind: Of its blocks.
        rows: Of the layer.
    """

    name: str
    kind: GgmlType
    rows: slice


class Blocks(Tiled):
    """Each part with the type of its own.

    Args:
        kinds: By name of the part.
    """

    def __init__(self, kinds: Mapping[str, GgmlType]) -> None:
        self.kinds = kinds

    def stacks(self, layer: Linear) -> list[Segment]:
        """Where the blocks are, in the order of the layer's rows."""
        found: list[Segment] = []
        for part, kind in self.kinds.items():
            rows = layer.rows(part)
            if found and found[-1].kind == kind:
                found[-1] = found[-1]._replace(rows=slice(found[-1].rows.start, rows.stop))
            else:
                found.append(Segment(f"blocks_{len(found)}", kind, rows))
        return found

    def create(self, layer: Linear) -> None:
        """Add a parameter for each run of parts of one type."""
        for name, kind, rows in self.stacks(layer):
            shape = (rows.stop - rows.start, row_bytes(kind, layer.in_features))
            empty = torch.empty(shape, dtype=torch.uint8)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """Some rows of one parameter."""
        shape = (layer.parts[part], layer.in_features)
        kinds = frozenset({self.kinds[part].name})

        def take(blocks: Tensor) -> None:
            self.held(layer, part).copy_(blocks)

        return {"weight": Place(shape, kinds, take)}

    def pack(self, layer: Linear) -> None:
        """Repack for the device's kernels, if there are any."""
        stacks = self.stacks(layer)
        if serves(getattr(layer, stacks[0].name).device):
            self._pack_for_gpu(layer, stacks)
            return
        if (library := library_for_blocks(getattr(layer, stacks[0].name))) is None:
            return
        packed: list[PackedBlocks] = []
        for name, kind, _ in stacks:
            packed.append(pack_blocks(library, getattr(layer, name), kind.name, layer.in_features))
            setattr(layer, name, nn.Parameter(packed[-1].data, requires_grad=False))
        layer.keep_packed(stack(packed))

    def _pack_for_gpu(self, layer: Linear, stacks: Sequence[Segment]) -> None:
        segments = [
            GpuSegment(rows, None, block_planes(getattr(layer, name), kind, layer.in_features))
            for name, kind, rows in stacks
        ]
        keep_on_gpu(layer, segments, [name for name, _, _ in stacks])

    def held(self, layer: Linear, part: str) -> Tensor:
        """The blocks of a part: uint8 [rows, bytes per row]."""
        rows = layer.rows(part)
        name, _, whole = next(s for s in self.stacks(layer) if rows.start < s.rows.stop)
        return getattr(layer, name)[rows.start - whole.start : rows.stop - whole.start]

    def segments(self, layer: Linear) -> Iterator[tuple[slice, None]]:
        """The rows of each parameter, columns as they come."""
        for segment in self.stacks(layer):
            yield segment.rows, None

    def tile(self, layer: Linear, rows: slice) -> Tensor:
        """[n, K] float32."""
        name, kind, whole = next(s for s in self.stacks(layer) if rows.start < s.rows.stop)
        some = getattr(layer, name)[rows.start - whole.start : rows.stop - whole.start]
        return dequantize(some, kind, layer.in_features)

    def gather(self, layer: Linear, rows: Tensor) -> Tensor:
        """Some rows: [T] -> [T, K] float32."""
        if layer.packed is not None:
            return layer.packed.gather(rows)
        name, kind, _ = self._only(layer)
        return dequantize(getattr(layer, name)[rows], kind, layer.in_features)

    def _only(self, layer: Linear) -> Segment:
        [segment] = self.stacks(layer)
        return segment


class GgufScheme:
    """Implements `Scheme`: every layer as its file has it."""

    def method(
        self, names: Sequence[str], layer: Linear, saved: Mapping[str, SavedTensor]
    ) -> LinearMethod | None:
        """Blocks, plain numbers (None), or both side by side."""
        found = (saved.get(f"{name}.weight") for name in names)
        kinds = {
            part: None if tensor is None else BLOCK_KINDS.get(tensor.kind)
            for part, tensor in zip(layer.parts, found, strict=True)
        }
        return blocks_or_plain(kinds, Blocks)


def blocks_or_plain(
    kinds: Mapping[str, GgmlType | None], blocks: type[Blocks]
) -> LinearMethod | None:
    """One method for a layer's parts.

    Args:
        kinds: By name of the part; None is plain numbers.
        blocks: Holds those that have a type.
    """
    quantized = {part: kind for part, kind in kinds.items() if kind is not None}
    if not quantized:
        return None
    if len(quantized) == len(kinds):
        return blocks(quantized)
    return Separate(
        {part: Dense() if kind is None else blocks({"": kind}) for part, kind in kinds.items()}
    )
