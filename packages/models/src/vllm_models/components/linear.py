"""Linear layers. How a weight is stored and multiplied is a `LinearMethod`, which no architecture
sees; which tensors of the checkpoint make up a layer is told by `parts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_models.gpu.launch import kernels_for, serves
from vllm_models.native.dense import PackedDense
from vllm_models.native.library import library_for
from vllm_models.native.ordered import OrderedBlocks
from vllm_models.native.packed import PackedWeight, zeros_of
from vllm_models.weights.saved import PLAIN_KINDS


class Place(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
        shape: It must have.
        kinds: Of which it must be one, see `SavedTensor.kind`.
        take: Keeps it; a ValueError says what is wrong with the values.
        optional: The checkpoint may leave it out.
    """

    shape: tuple[int, ...]
    kinds: frozenset[str]
    take: Callable[[Tensor], None]
    optional: bool = False


class Packed(Protocol):
    """A weight in the order of the device's kernels, see `vllm_models.native` and `gpu.layout`."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight: [T] -> [T, in_features]."""
        ...

    def dequantize(self) -> Tensor:
        """[out_features, in_features] float32."""
        ...


class LinearMethod(ABC):
    """One way to hold the weight [out_features, in_features] of a linear layer."""

    @abstractmethod
    def create(self, layer: Linear) -> None:
        """Add empty parameters to the layer."""

    @abstractmethod
    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """What a part has in the checkpoint, by suffix of its name, such as "weight"."""

    def pack(self, layer: Linear) -> None:  # noqa: B027 - most have nothing to do
        """Change to the form that `apply` wants, after every tensor was taken."""

    @abstractmethod
    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in_features] -> [T, out_features]."""

    @abstractmethod
    def dequantize(self, layer: Linear) -> Tensor:
        """The weight as numbers: [out_features, in_features] float32."""

    def packed_parts(self, layer: Linear) -> list[Packed | None]:
        """What the device's kernels multiply; None stands for a part that torch does."""
        return [layer.packed]

    def gather(self, layer: Linear, rows: Tensor) -> Tensor:
        """Some rows of the weight, for embeddings: [T] -> [T, in_features]."""
        return F.embedding(rows, self.dequantize(layer))


class Dense(LinearMethod):
    """The weight as it is, [out_features, in_features]; on a CPU in the order of its kernels."""

    def create(self, layer: Linear) -> None:
        """Add `weight`."""
        shape = (layer.out_features, layer.in_features)
        layer.weight = nn.Parameter(torch.empty(shape), requires_grad=False)

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """Some rows of `weight`."""
        rows, width = layer.rows(part), layer.parts[part]
        shape = (width, layer.in_features)
        return {"weight": Place(shape, PLAIN_KINDS, lambda t: layer.weight[rows].copy_(t))}

    def pack(self, layer: Linear) -> None:
        """Reorder for the CPU's kernels, if there are any."""
        library = None if serves(layer.weight.device) else library_for(layer.weight)
        if library is not None:
            packed = PackedDense(library, layer.weight)
            layer.weight = nn.Parameter(packed.data, requires_grad=False)
            layer.keep_packed(packed)

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply by the transposed weight."""
        if layer.packed is not None:
            return layer.packed.matmul(x, bias)
        if (gpu := kernels_for(x)) is not None:
            return gpu.dense_matmul(x, layer.weight, bias, layer.fixed_order)
        return F.linear(x, layer.weight, bias)

    def dequantize(self, layer: Linear) -> Tensor:
        """In float32."""
        return layer.weight.float() if layer.packed is None else layer.packed.dequantize()

    def gather(self, layer: Linear, rows: Tensor) -> Tensor:
        """Plain lookup."""
        if layer.packed is not None:
            return layer.packed.gather(rows)
        return F.embedding(rows, layer.weight)


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: Width of x.
        out_features: Width of y, or the widths of the checkpoint's layers that are stacked here,
            by name: `{"q_proj": 64, "k_proj": 32, "v_proj": 32}` reads three neighbours of this
            layer as one.
        bias: Whether b is there.

    Attributes:
        fixed_order: Sums on a GPU follow from the shape of the weight alone.
    """

    weight: Tensor
    packed: Packed | None = None
    _scores: Tensor | None = None  # [N, out_features]
    fixed_order: bool = False

    def __init__(
        self, in_features: int, out_features: int | Mapping[str, int], bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self.out_features = sum(self.parts.values())
        empty = torch.empty(self.out_features) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.method: LinearMethod = Dense()
        self.method.create(self)

    def use(self, method: LinearMethod) -> None:
        """Hold the weight in another way, before anything was loaded."""
        for name in [name for name, _ in self.named_parameters(recurse=False) if name != "bias"]:
            delattr(self, name)
        self.method = method
        method.create(self)

    def keep_packed(self, packed: Packed) -> None:
        """Multiply with the CPU's kernels from now on, which want biases in float32."""
        self.packed = packed
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.float(), requires_grad=False)

    def rows(self, part: str) -> slice:
        """Which outputs are a part's."""
        first = 0
        for name, width in self.parts.items():
            if name == part:
                return slice(first, first + width)
            first += width
        raise KeyError(part)

    def places(self, path: str) -> Iterator[tuple[str, Place]]:
        """Every tensor of the checkpoint that belongs to this layer, by its full name."""
        for part, width in self.parts.items():
            name = self.name_of(path, part)
            for suffix, place in self.method.places(self, part).items():
                yield f"{name}.{suffix}", place
            if self.bias is not None:
                rows = self.rows(part)
                take = lambda t, rows=rows: self.bias[rows].copy_(t)  # noqa: E731
                yield f"{name}.bias", Place((width,), PLAIN_KINDS, take)

    def name_of(self, path: str, part: str) -> str:
        """What the checkpoint calls a part of the layer that we call `path`."""
        parent = path.rpartition(".")[0]
        return path if not part else f"{parent}.{part}" if parent else part

    def forward(self, x: Tensor) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        return self.method.apply(self, x, self.bias)

    def scores(self, x: Tensor) -> Tensor:
        """The same, valid until the next call; in float32 where a kernel of the CPU can leave its
        sums as they are.

        Scores of a vocabulary are so many numbers that new memory for each step would cost a good
        part of it, so these keep theirs.
        """
        if not isinstance(self.packed, PackedWeight | OrderedBlocks):
            return self.method.apply(self, x, self.bias)
        if self._scores is None or len(self._scores) < len(x):
            self._scores = zeros_of((len(x), self.out_features), torch.float32)
        return self.packed.matmul(x, self.bias, out=self._scores[: len(x)])
