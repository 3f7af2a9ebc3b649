"""Weights in bfloat16 or float32, in the order in which the kernel reads them (dense.c).

A row's result does not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_models.native.library import Library
from vllm_models.native.packed import TYPES, PackedWeight, address, zeros

PANEL = 64  # outputs


class _Weight(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class PackedDense(PackedWeight):
    """A weight [outputs, columns] for `matmul`.

    Args:
        library: The kernels.
        weight: [outputs, columns] bfloat16 or float32; not needed afterwards.
    """

    def __init__(self, library: Library, weight: Tensor) -> None:
        self.library = library
        self._linear = library.dense_linear
        self.dtype = weight.dtype
        self.outputs, self.columns = weight.shape
        steps = self.columns if weight.dtype == torch.float32 else -(-self.columns // 2)
        self.data = zeros(-(-self.outputs // PANEL) * PANEL * steps * 4)
        fields = (self.data.data_ptr(), self.outputs, self.columns, TYPES[self.dtype])
        self._weight = _Weight(*fields)
        self._arguments = (address(self._weight),)
        weight = weight.contiguous()
        library.dense_pack(*self._arguments, weight.data_ptr())

    @property
    def weight(self) -> _Weight:
        """What the kernels are told of it."""
        return self._weight

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.data.numel()

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight: [T] int64 -> [T, columns] of the weight's dtype."""
        rows = rows.contiguous()
        out = torch.empty((len(rows), self.columns), dtype=self.dtype)
        width = self.columns * self.dtype.itemsize
        self.library.dense_gather(
            *(self.data.data_ptr(), width, rows.data_ptr(), len(rows), out.data_ptr())
        )
        return out

    def dequantize(self) -> Tensor:
        """The weight as it was given, in float32."""
        rows = self._panels.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[: self.outputs, : self.columns].float()

    @property
    def _panels(self) -> Tensor:
        """[panels, steps, outputs of a panel, columns of a step]."""
        pairs = 2 if self.dtype == torch.bfloat16 else 1
        return self.data.view(self.dtype).view(-(-self.outputs // PANEL), -1, PANEL, pairs)


def reference(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The textbook form, in float64 from operands of the weight's dtype."""
    y = x.to(weight.dtype).double() @ weight.double().T
    return y if bias is None else y + bias
