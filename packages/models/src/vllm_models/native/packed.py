"""Packed weights and what they share: operands checked once, addresses handed to C."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_HUGE = 2 << 20  # bytes


class PackedWeight:
    """A weight, or several with the same columns, in the order of a kernel.

    Attributes:
        outputs: Rows of the weight.
        columns: Width of x.
    """

    outputs: int
    columns: int
    _linear: Callable[..., int]
    _arguments: tuple[int, ...]

    def matmul(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [M, columns] by the transposed weight: [M, outputs].

        Args:
            x: float32 or bfloat16, rounded to what the kernel multiplies.
            bias: [outputs], added last in float32.
            dtype: Of the result, float32 or bfloat16; x's unless given.
            out: Where the result goes, [M, outputs]; its rows may be apart.
        """
        shape = (self.outputs, self.columns)
        return multiply(self._linear, self._arguments, shape, x, bias, dtype, out)


def multiply(
    function: Callable[..., int],
    weights: tuple[int, ...],
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """Call a linear kernel with the addresses of x [M, columns] and of the result [M, outputs].

    Args:
        function: Of the library; 0 means done.
        weights: Its first arguments.
        shape: outputs and columns of the weight.
        x: float32 or bfloat16, else it is converted; rows may be apart.
        bias: [outputs]; float32, else it is converted.
        dtype: Of the result, x's unless given.
        out: Where the result goes, made unless given; rows may be apart.
    """
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    outputs, columns = shape
    rows, width = x.shape
    assert width == columns, f"x is {tuple(x.shape)}, the weight has {columns} columns"
    kind = TYPES.get(x.dtype)
    if kind is None:
        x, kind = x.float(), 0
    row_stride, stride = x.stride()
    if stride != 1:
        x = x.contiguous()
        row_stride = columns
    if out is None:
        out = torch.empty((rows, outputs), dtype=dtype or x.dtype)
        out_stride = outputs
    else:
        out_stride = _checked(out, rows, outputs)
    failed = function(
        *(*weights, x.data_ptr(), row_stride, kind, _bias_address(bias, outputs)),
        *(out.data_ptr(), out_stride, TYPES[out.dtype], rows),
    )
    if failed:
        raise MemoryError("no memory for the activations of a linear layer")
    return out


def _checked(out: Tensor, rows: int, outputs: int) -> int:
    """The stride of a result that was given."""
    assert out.shape == (rows, outputs), f"out is {tuple(out.shape)}"
    assert out.stride(1) == 1, "out: the numbers of a row must be neighbours"
    return out.stride(0)


def _bias_address(bias: Tensor | None, outputs: int) -> int | None:
    if bias is None:
        return None
    assert bias.dtype == torch.float32, f"bias is {bias.dtype}"
    assert bias.shape == (outputs,) and bias.is_contiguous(), f"bias is {tuple(bias.shape)}"
    return bias.data_ptr()


def zeros(num_bytes: int) -> Tensor:
    """Memory for packed weights, in large pages where the system has them: weights are read from
    end to end in every step, and every small page is looked up anew.
    """
    if num_bytes < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the memory


def zeros_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that are memory only once they are touched, and no more as soon as nobody has them."""
    return zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))


def address(structure: ctypes.Structure | ctypes.Array[ctypes.Structure]) -> int:
    """Where a structure lies; it must be kept as long as the address."""
    return ctypes.addressof(structure)
