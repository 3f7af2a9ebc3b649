"""The linear layers of a mixture of experts as one call: the rows of each expert by its own weight.

Every row has the bits that its expert's `matmul` would give it alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_models.native.blocks import PackedBlocks
from vllm_models.native.dense import PackedDense
from vllm_models.native.packed import TYPES, address


class PackedExperts:
    """The same layer of every expert, all of one shape and one way to hold weights.

    Args:
        experts: Packed weights, in the order of the experts; their memory is shared, not copied.
    """

    def __init__(self, experts: Sequence[PackedDense] | Sequence[PackedBlocks]) -> None:
        first = experts[0]
        self.outputs, self.columns = first.outputs, first.columns
        assert all((e.outputs, e.columns) == (self.outputs, self.columns) for e in experts)
        self._kept = tuple(experts)
        self.num_experts = len(experts)
        structures, num_parts = _structures(experts)
        self._weights = (type(structures[0]) * len(structures))(*structures)
        given = (address(self._weights), self.num_experts)
        self._function: Callable[..., int] = first.library.dense_experts
        if num_parts:
            self._function = first.library.blocks_experts
            given = (given[0], num_parts, self.num_experts)
        self._arguments = given

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(expert.nbytes for expert in self._kept)

    def matmul(
        self, x: Tensor, starts: Tensor, index: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Rows of x by the transposed weight of their expert: [N, outputs] of x's dtype.

        Args:
            x: [N, columns], or with an index [any, columns]; float32 or bfloat16.
            starts: [num_experts + 1] int64 from 0 to N; expert e has the rows from starts[e] to
                starts[e + 1].
            index: [N] int64; row i is x[index[i]].
            bias: [num_experts, outputs] float32.
        """
        assert x.shape[1] == self.columns and x.stride(1) == 1, f"x is {tuple(x.shape)}"
        assert starts.shape == (self.num_experts + 1,) and starts.is_contiguous()
        assert bias is None or bias.shape == (self.num_experts, self.outputs)
        rows = len(x) if index is None else len(index)
        out = torch.empty((rows, self.outputs), dtype=x.dtype)
        failed = self._function(
            *(*self._arguments, starts.data_ptr(), _address(index)),
            *(x.data_ptr(), x.stride(0), TYPES[x.dtype], _address(bias)),
            *(out.data_ptr(), self.outputs, TYPES[out.dtype]),
        )
        if failed:
            raise MemoryError("no memory for the activations of the experts")
        return out


def _structures(
    experts: Sequence[PackedDense] | Sequence[PackedBlocks],
) -> tuple[list[ctypes.Structure], int]:
    """Every weight in turn, and how many parts an expert has; 0 if weights have no parts."""
    found: list[ctypes.Structure] = []
    counts: set[int] = set()
    for expert in experts:
        parts = [expert.weight] if isinstance(expert, PackedDense) else expert.weights
        counts.add(0 if isinstance(expert, PackedDense) else len(parts))
        found += parts
    assert len(counts) == 1, "experts have equally many parts"
    return found, counts.pop()


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "must be contiguous"
    return tensor.data_ptr()


def reference(
    experts: Sequence[PackedDense] | Sequence[PackedBlocks], x: Tensor, starts: Tensor
) -> Tensor:
    """Expert by expert."""
    rows = x.split(starts.diff().tolist())
    return torch.cat([expert.matmul(own) for expert, own in zip(experts, rows, strict=True)])
