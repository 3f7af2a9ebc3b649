"""Packed weights and what they share: operands checked once, addresses handed to C."""

from __future__ import annotations

import ctypes
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_HUGE = 2 << 20  # bytes


class Operands(NamedTuple):
    """The arguments of a C function for x and for the result."""

    x: tuple[int, int, int]  # address, stride, type
    out: tuple[int, int, int]
    result: Tensor
    kept: Tensor  # x, so that its memory lives until the call is over


def operands(x: Tensor, outputs: int, dtype: torch.dtype | None, out: Tensor | None) -> Operands:
    """Addresses of x [M, K] and of the result [M, outputs], which is made unless given.

    Args:
        x: float32 or bfloat16; rows may be apart, numbers of a row may not.
        outputs: Width of the result.
        dtype: Of the result, x's unless given.
        out: Where the result goes; rows may be apart.
    """
    if x.dtype not in TYPES:
        x = x.float()
    if x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty((x.shape[0], outputs), dtype=dtype or x.dtype)
    assert out.shape == (x.shape[0], outputs), f"out is {tuple(out.shape)}"
    assert out.stride(1) == 1, "out: the numbers of a row must be neighbours"
    return Operands(
        (x.data_ptr(), x.stride(0), TYPES[x.dtype]),
        (out.data_ptr(), out.stride(0), TYPES[out.dtype]),
        out,
        x,
    )


def bias_address(bias: Tensor | None, outputs: int) -> int | None:
    """The address of a float32 bias."""
    if bias is None:
        return None
    assert bias.dtype == torch.float32, f"bias is {bias.dtype}"
    assert bias.shape == (outputs,) and bias.is_contiguous(), f"bias is {tuple(bias.shape)}"
    return bias.data_ptr()


def zeros(num_bytes: int) -> Tensor:
    """Memory for packed weights, in large pages where the system has them: weights are read from
    end to end in every step, and small pages cost a tenth of the bandwidth.
    """
    if num_bytes < _HUGE:
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes)  # zeros; lives as long as the tensor
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def address(structure: ctypes.Structure | ctypes.Array[ctypes.Structure]) -> int:
    """Where a structure lies; it must be kept as long as the address."""
    return ctypes.addressof(structure)
