"""The KV pool: layers that keep the same shape and look back equally far share tensors.

A sequence has one block table, and a block is the same row in the tensors of every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from vllm_traits import ConfigError, DeviceError, KVGroup

from vllm_models.components.context import LayerKV
from vllm_models.gpu.launch import has_fp8, serves
from vllm_models.kernels.kv_side import LARGEST, KVSide
from vllm_models.native.attention import block_shapes as native_shapes
from vllm_models.native.attention import fits
from vllm_models.native.library import library
from vllm_models.native.packed import zeros_of

Layout = Literal["torch", "native", "triton"]


class KVPool(NamedTuple):
    """KV memory of all layers.

    Attributes:
        groups: Keys and values of each group, with L layers and B + 1 blocks before the dimensions
            of `KVSide`; the last block pads tables. Without values, the keys stand in their place.
        layers: Keys and values of every layer: views into the groups.
        windows: Of every layer: positions a query looks back; 0 is all.
        block_size: Positions per block.
        layout: Whose order the numbers of a block are in.
        compute_dtype: Of the queries that attend to it.
    """

    groups: tuple[tuple[KVSide, KVSide], ...]
    layers: tuple[tuple[KVSide, KVSide], ...]
    windows: tuple[int, ...]
    block_size: int
    layout: Layout
    compute_dtype: torch.dtype

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences may use."""
        return self.groups[0][0].data.shape[1] - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.groups[0][0].data.device

    @property
    def dtype(self) -> torch.dtype:
        """What is stored, beside scales if it has eight bits."""
        return self.groups[0][0].data.dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is kept of blocks, [L, B + 1, ...] each; eight bits of any type are
        bytes, which torch can copy everywhere.
        """
        found = (t for group in self.groups for side in group for t in side if t is not None)
        found = (t.view(torch.uint8) if t.itemsize == 1 else t for t in found)
        return tuple({tensor.data_ptr(): tensor for tensor in found}.values())

    def wipe(self, blocks: list[int]) -> None:
        """Set blocks to zero in all layers."""
        for tensor in self.tensors:
            tensor[:, blocks] = 0


def kv_dtype(
    name: str, layers: Sequence[LayerKV], dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """How keys and values are stored.

    Args:
        name: Of `options.KV_CACHE_DTYPES`.
        layers: Of the model.
        dtype: What it computes in.
        device: Where.

    Raises:
        ConfigError: It cannot be stored so.
    """
    if name == "auto":
        return dtype
    if any(layer.value_dim == 0 for layer in layers):
        raise ConfigError(
            f"kv_cache_dtype is {name!r}, but this model keeps a latent vector in the place of "
            "keys and values, which is small already and stays as it is computed; use auto."
        )
    if name == "fp8" and not has_fp8(device):
        raise ConfigError(
            "kv_cache_dtype is 'fp8', but only CUDA devices of capability 8.9 and newer convert to "
            "it, by kernels in Triton; int8 takes as much memory and works here."
        )
    return torch.int8 if name == "int8" else torch.float8_e4m3fn


def kv_groups(
    layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype
) -> tuple[KVGroup, ...]:
    """Layers of a model by what they keep; one that reads another's KV belongs to none.

    Args:
        layers: Of the model.
        block_size: Positions per block.
        dtype: Of what is stored; eight bits have scales.
    """
    members: dict[LayerKV, list[int]] = {}
    for index, layer in enumerate(layers):
        if layer.shared_with is None:
            members.setdefault(layer, []).append(index)
    return tuple(
        KVGroup(
            name="latent" if kind.value_dim == 0 else "sliding" if kind.window else "full",
            layers=tuple(indices),
            num_kv_heads=kind.num_kv_heads,
            key_dim=kind.key_dim,
            value_dim=kind.value_dim,
            dtype=str(dtype).removeprefix("torch."),
            bytes_per_block=len(indices) * block_size * _position_bytes(kind, dtype),
            window=kind.window,
        )
        for kind, indices in members.items()
    )


def _position_bytes(kind: LayerKV, dtype: torch.dtype) -> int:
    """Of one layer."""
    num_sides = 2 if kind.value_dim else 1
    scales = num_sides * torch.float32.itemsize if dtype in LARGEST else 0
    return kind.num_kv_heads * ((kind.key_dim + kind.value_dim) * dtype.itemsize + scales)


def bytes_per_token(layers: Sequence[LayerKV], dtype: torch.dtype) -> int:
    """KV that a position takes in all layers together, stored in a type."""
    return sum(group.bytes_per_block for group in kv_groups(layers, 1, dtype))


def allocate_kv(
    layers: Sequence[LayerKV],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> KVPool:
    """A pool of zeros: positions behind a sequence's end are multiplied by 0, not skipped.

    Args:
        layers: Of the model.
        num_blocks: That sequences may use.
        block_size: Positions per block.
        dtype: What the model computes in.
        device: Where.
        stored: From `kv_dtype`; `dtype` unless given.

    Raises:
        DeviceError: It does not fit.
    """
    stored = stored or dtype
    groups = kv_groups(layers, block_size, stored)
    layout = _layout(groups, block_size, dtype, device)
    sides: list[tuple[KVSide, KVSide]] = []
    own: dict[int, tuple[KVSide, KVSide]] = {}
    try:
        for group in groups:
            shapes = block_shapes(group, block_size, dtype, layout)
            count = (len(group.layers), num_blocks + 1)
            scales = _scale_shape(group, block_size, layout) if stored in LARGEST else None
            keys = _side(count, shapes[0], scales, stored, device)
            values = keys
            if group.value_dim:
                values = _side(count, shapes[1], scales, stored, device)
            sides.append((keys, values))
            for index, layer in enumerate(group.layers):
                own[layer] = (keys.of(index), values.of(index))
    except (RuntimeError, OSError, OverflowError) as error:
        wanted = num_blocks * sum(group.bytes_per_block for group in groups)
        raise DeviceError(f"{wanted} bytes for {num_blocks} KV blocks do not fit.") from error
    sources = (index if x.shared_with is None else x.shared_with for index, x in enumerate(layers))
    windows = tuple(layer.window for layer in layers)
    views = tuple(own[source] for source in sources)
    return KVPool(tuple(sides), views, windows, block_size, layout, dtype)


def _side(
    count: tuple[int, int],
    block: tuple[int, ...],
    scales: tuple[int, int] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> KVSide:
    data = _zeros((*count, *block), dtype, device)
    if scales is None:
        return KVSide(data)
    return KVSide(data, _zeros((*count, *scales), torch.float32, device))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU blocks take memory when they are first written: writing all takes a long start."""
    if device.type == "cpu":
        return zeros_of(shape, dtype)
    return torch.zeros(shape, dtype=dtype, device=device)


def _layout(
    groups: Sequence[KVGroup], block_size: int, dtype: torch.dtype, device: torch.device
) -> Layout:
    """Triton's or the CPU kernels' own, where they are there and can serve every group."""
    if serves(device):
        return "triton"
    if device.type != "cpu" or library() is None:
        return "torch"
    served = (fits(block_size, group.key_dim, group.value_dim, dtype) for group in groups)
    return "native" if all(served) else "torch"


def block_shapes(
    group: KVGroup, block_size: int, dtype: torch.dtype, layout: Layout
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the keys and of the values of one block of a layer, for queries of a type."""
    if layout == "native":
        return native_shapes(block_size, group.num_kv_heads, group.key_dim, group.value_dim, dtype)
    shape = (block_size, group.num_kv_heads)
    if layout == "triton":
        shape = (group.num_kv_heads, block_size)
    return (*shape, group.key_dim), (*shape, group.value_dim)


def _scale_shape(group: KVGroup, block_size: int, layout: Layout) -> tuple[int, int]:
    """Of the scales of one block of a layer."""
    if layout == "torch":
        return block_size, group.num_kv_heads
    return group.num_kv_heads, block_size
