"""The one form in which integer weights of any format are held, and their product.

For a weight [O, K] of `bits` 4 or 8 with groups of G columns, everything row major:

    codes   uint8 [O, K/2] or [O, K]  4 bit: byte i has column 2i in its low half, then 2i + 1
    scales  f16 or f32 [O, K/G]
    zeros   uint8 [O, K/G]            absent: 2**(bits - 1) everywhere
    orders  int64 [1 or parts, K]     absent: columns as they come

    weight[o, c] = (code[o, k] - zeros[o, k // G]) * scales[o, k // G]     with c = orders[., k]

`orders` has a row per part if the parts of a layer differ. Where a format stores its bytes is the
business of the subclasses, which fill this form while a checkpoint is read. On a CPU with kernels,
groups of a multiple of 32 columns, or of whole rows, are then repacked for these, with scales of 16
bits; `orders` stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Linear, Place
from vllm_models.gpu.launch import serves
from vllm_models.gpu.layout import Planes
from vllm_models.native.blocks import PackedBlocks, fits_groups, keeps_scales, pack_grouped
from vllm_models.native.library import Library, library_for_blocks
from vllm_models.native.ordered import OrderedBlocks, Sorted
from vllm_models.quantization.on_gpu import GpuSegment, grouped_planes, keep_on_gpu
from vllm_models.quantization.tiles import Tiled

SCALE_KINDS = frozenset({"F16", "BF16", "F32"})


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., K] below 2**bits -> bytes [..., K * bits / 8]."""
    return codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `pack_codes`."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def word_bytes(words: Tensor) -> Tensor:
    """int32 [..., n] -> uint8 [..., 4n], the lowest byte of each word first."""
    flat = words.reshape(-1).view(torch.uint8)
    return flat.view(*words.shape[:-1], 4 * words.shape[-1])


def check_finite(values: Tensor) -> Tensor:
    """The values, if all of them are numbers; raises ValueError."""
    if not bool(values.isfinite().all()):
        raise ValueError("holds values that are not finite")
    return values


@dataclass(frozen=True)
class Grouped(Tiled):
    """Integers with a scale, and perhaps a zero point, per group of columns.

    Attributes:
        bits: 4 or 8.
        group_size: Columns of a group; divides in_features.
        scale_dtype: float16 or float32.
        has_zeros: Zero points are stored.
        has_order: Columns may be grouped in an order of their own.
    """

    bits: int
    group_size: int
    scale_dtype: torch.dtype = torch.float32
    has_zeros: bool = True
    has_order: bool = False

    def create(self, layer: Linear) -> None:
        """Add `codes`, `scales`, `zeros`, and until `pack` the group of each column."""
        num_groups = layer.in_features // self.group_size
        shape = (layer.out_features, num_groups)
        width = layer.in_features * self.bits // 8
        layer.codes = _empty((layer.out_features, width), torch.uint8)
        layer.scales = _empty(shape, self.scale_dtype)
        if self.has_zeros:
            layer.zeros = _empty(shape, torch.uint8)
        if self.has_order:
            layer.groups = _empty((len(layer.parts), layer.in_features), torch.int32)

    def keep_scales(self, layer: Linear, rows: slice, scales: Tensor) -> None:
        """Some rows of `scales`, [n, K/G] or [n, 1] or scalar."""
        layer.scales[rows].copy_(check_finite(scales.to(self.scale_dtype)))

    def keep_bias(self, layer: Linear) -> dict[str, Place]:
        """Some packers save a bias of zeros for layers that have none."""
        width = (layer.out_features,)
        return {} if layer.bias is not None else {"bias": Place(width, SCALE_KINDS, _zeros, True)}

    def group_place(self, layer: Linear, part: str, needed: bool = False) -> Place:
        """Of the group of each column, int32 [K]."""
        index = list(layer.parts).index(part)
        num_groups = layer.in_features // self.group_size
        take = partial(self._take_groups, layer, index, num_groups)
        return Place((layer.in_features,), frozenset({"I32"}), take, optional=not needed)

    def _take_groups(self, layer: Linear, index: int, num_groups: int, groups: Tensor) -> None:
        is_placeholder = bool((groups == -1).all()) or not bool(groups.any())
        if is_placeholder:
            groups = torch.arange(layer.in_features, dtype=torch.int32) // self.group_size
        counts = groups.clamp(0, num_groups).long().bincount(minlength=num_groups)
        if bool((groups < 0).any()) or counts.tolist() != [self.group_size] * num_groups:
            raise ValueError(
                f"does not sort the columns into {num_groups} groups of {self.group_size}"
            )
        layer.groups[index].copy_(groups)

    def pack(self, layer: Linear) -> None:
        """Sort the columns of every part by group, and reorder for the device's kernels."""
        self._sort_columns(layer)
        if serves(layer.codes.device):
            self._pack_for_gpu(layer)
        elif (library := library_for_blocks(layer.codes)) is not None and self.fits_cpu(layer):
            self._pack_for_cpu(layer, library)

    def fits_cpu(self, layer: Linear) -> bool:
        """Whether the CPU's kernels can hold the weight."""
        return fits_groups(layer.in_features, self.group_size) and keeps_scales(layer.scales)

    def _pack_for_cpu(self, layer: Linear, library: Library) -> None:
        weights = [
            Sorted(self._packed(layer, library, rows), order)
            for rows, order in self.segments(layer)
        ]
        for name in ("codes", "scales", "zeros") if self.has_zeros else ("codes", "scales"):
            delattr(layer, name)
        for index, (packed, _) in enumerate(weights):
            setattr(layer, f"blocks_{index}", nn.Parameter(packed.data, requires_grad=False))
        [(first, order), *others] = weights
        layer.keep_packed(OrderedBlocks(weights) if others or order is not None else first)

    def _packed(self, layer: Linear, library: Library, rows: slice) -> PackedBlocks:
        scales = layer.scales[rows]
        middle = torch.tensor(1 << (self.bits - 1), dtype=torch.uint8)
        zeros = layer.zeros[rows] if self.has_zeros else middle.expand_as(scales)
        return pack_grouped(library, layer.codes[rows], scales, zeros, self.bits)

    def _pack_for_gpu(self, layer: Linear) -> None:
        segments = [
            GpuSegment(rows, order, self.planes(layer, rows))
            for rows, order in self.segments(layer)
        ]
        names = ("codes", "scales", "zeros") if self.has_zeros else ("codes", "scales")
        keep_on_gpu(layer, segments, names)

    def planes(self, layer: Linear, rows: slice) -> Planes:
        """Some rows in the form of the GPU's kernels."""
        return grouped_planes(
            unpack_codes(layer.codes[rows], self.bits),
            layer.scales[rows],
            layer.zeros[rows] if self.has_zeros else None,
            bits=self.bits,
            group_size=self.group_size,
        )

    def _sort_columns(self, layer: Linear) -> None:
        if not self.has_order:
            return
        orders = layer.groups.argsort(dim=-1, stable=True)
        del layer.groups
        if bool((orders == orders[:1]).all()):
            orders = orders[:1]
        if bool((orders == torch.arange(layer.in_features, device=orders.device)).all()):
            return
        layer.orders = nn.Parameter(orders.contiguous(), requires_grad=False)
        for rows, order in self.segments(layer):
            codes = unpack_codes(layer.codes[rows], self.bits)
            layer.codes[rows] = pack_codes(codes[:, order], self.bits)

    def segments(self, layer: Linear) -> Iterator[tuple[slice, Tensor | None]]:
        """The whole layer, or its parts if they differ in their order of columns."""
        orders = getattr(layer, "orders", None)
        if orders is None or len(orders) == 1:
            yield slice(0, layer.out_features), None if orders is None else orders[0]
            return
        for order, part in zip(orders, layer.parts, strict=True):
            yield layer.rows(part), order

    def tile(self, layer: Linear, rows: slice) -> Tensor:
        """(codes - zeros) * scales: [n, K] float32."""
        codes = unpack_codes(layer.codes[rows], self.bits).float()
        codes = codes.unflatten(-1, (-1, self.group_size))  # [n, K/G, G]
        if self.has_zeros:
            codes -= layer.zeros[rows].unsqueeze(-1)
        else:
            codes -= 1 << (self.bits - 1)
        return codes.mul_(layer.scales[rows].float().unsqueeze(-1)).flatten(1)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def _zeros(bias: Tensor) -> None:
    if bool(bias.any()):
        raise ValueError("is a bias, which this layer of the architecture does not have")
