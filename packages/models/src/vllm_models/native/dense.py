"""Weights in bfloat16 or float32, in the order in which the kernel reads them (dense.c).

A row's result does not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_models.native.library import Library
from vllm_models.native.packed import TYPES, address, bias_address, operands, zeros

PANEL = 64  # outputs


class _Weight(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int64),
    )


class PackedDense:
    """A weight [outputs, columns] for `matmul`.

    Args:
        library: The kernels.
        weight: [outputs, columns] bfloat16 or float32; not needed afterwards.
    """

    def __init__(self, library: Library, weight: Tensor) -> None:
        self.library = library
        self.dtype = weight.dtype
        self.outputs, self.columns = weight.shape
        steps = self.columns if weight.dtype == torch.float32 else -(-self.columns // 2)
        self.data = zeros(-(-self.outputs // PANEL) * PANEL * steps * 4)
        fields = (self.data.data_ptr(), self.outputs, self.columns, TYPES[self.dtype])
        self._weight = _Weight(*fields)
        self._address = address(self._weight)
        weight = weight.contiguous()
        library.dense_pack(self._address, weight.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self.data.numel()

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [M, columns] rounded to the weight's dtype, by the transposed weight: [M, outputs].

        Args:
            x: float32 or bfloat16.
            bias: [outputs] float32, added last.
            dtype: Of the result, float32 or bfloat16; x's unless given.
            out: Where the result goes, [M, outputs]; its rows may be apart.
        """
        assert x.shape[1] == self.columns, f"x is {tuple(x.shape)}, the weight has {self.columns}"
        given = operands(x, self.outputs, dtype, out)
        added = bias_address(bias, self.outputs)
        if self.library.dense_linear(self._address, *given.x, added, *given.out, len(x)):
            raise MemoryError("no memory for the activations of a linear layer")
        return given.result

    def gather(self, rows: Tensor) -> Tensor:
        """Some rows of the weight, as they were given: [T] -> [T, columns]."""
        pairs = 2 if self.dtype == torch.bfloat16 else 1
        panels = self.data.view(self.dtype).view(-(-self.outputs // PANEL), -1, PANEL, pairs)
        return panels[rows // PANEL, :, rows % PANEL].flatten(1)[:, : self.columns]

    def dequantize(self) -> Tensor:
        """The weight as it was given, in float32."""
        panels = self.data.view(self.dtype)
        pairs = 2 if self.dtype == torch.bfloat16 else 1
        rows = panels.view(-(-self.outputs // PANEL), -1, PANEL, pairs).transpose(1, 2)
        return rows.flatten(2).flatten(0, 1)[: self.outputs, : self.columns].float()


def reference(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The textbook form, in float64 from operands of the weight's dtype."""
    y = x.to(weight.dtype).double() @ weight.double().T
    return y if bias is None else y + bias
