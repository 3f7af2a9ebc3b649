"""The small work between products, in C: normalisation, gates, rotary positions.

A row's result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_models.native.library import Library
from vllm_models.native.packed import TYPES

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2}


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "residual", "weight")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "type")),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
    )


class _Gate(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width", "x_stride", "type", "activation")),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class _Angles(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "positions", "frequencies")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "pairs", "interleaved", "type")),
        ("amplitude", ctypes.c_float),
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "x", "cos", "sin", "weight")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "stride", "num_heads", "dim")),
        *((name, ctypes.c_int64) for name in ("rotated", "interleaved", "type")),
        ("eps", ctypes.c_float),
    )


def rms_norm(
    library: Library,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """x / rms(x) * (weight + offset), row by row: [..., width] -> [..., width].

    Args:
        library: The kernels.
        x: float32 or bfloat16; the numbers of a row are neighbours.
        weight: [width] of x's dtype; None is one everywhere.
        eps: Added to the mean square.
        offset: Added to the weight.
        residual: Of x's shape, contiguous: becomes residual + x, which is normalised instead of x.
    """
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype)
    call = _Norm(
        *(out.data_ptr(), rows.data_ptr(), None if residual is None else residual.data_ptr()),
        None if weight is None else weight.data_ptr(),
        *(rows.shape[0], rows.shape[1], rows.stride(0), TYPES[x.dtype], eps, offset),
    )
    library.rms_norm(ctypes.byref(call))
    return out


def gate(
    library: Library, gate_up: Tensor, activation: str, alpha: float = 0.0, limit: float = 0.0
) -> Tensor:
    """activation(first half) * second half: [T, 2F] -> [T, F].

    Args:
        library: The kernels.
        gate_up: float32 or bfloat16; the numbers of a row are neighbours.
        activation: One of `ACTIVATIONS`.
        alpha: Of clamped_swiglu, as in `kernels.clamped_swiglu`.
        limit: Likewise.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    call = _Gate(
        *(out.data_ptr(), gate_up.data_ptr(), rows, width, gate_up.stride(0)),
        *(TYPES[gate_up.dtype], ACTIVATIONS[activation], alpha, limit),
    )
    library.gate_rows(ctypes.byref(call))
    return out


def turn_angles(
    library: Library,
    positions: Tensor,
    frequencies: Tensor,
    amplitude: float,
    dtype: torch.dtype,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [T, 1, R], as in `kernels.angles`.

    Args:
        library: The kernels.
        positions: [T] int64, contiguous.
        frequencies: [R / 2] float32, contiguous.
        amplitude: Multiplies both.
        dtype: Of the results, float32 or bfloat16.
        interleaved: Pairs are neighbours, not halves.
    """
    count, pairs = len(positions), len(frequencies)
    cos, sin = (torch.empty((count, 1, 2 * pairs), dtype=dtype) for _ in range(2))
    call = _Angles(
        *(t.data_ptr() for t in (cos, sin, positions, frequencies)),
        *(count, pairs, interleaved, TYPES[dtype], amplitude),
    )
    library.turn_angles(ctypes.byref(call))
    return cos, sin


def rotate_heads(
    library: Library,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    interleaved: bool = False,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Turn heads by the positions of their tokens: [T, H, D] -> [T, H, D].

    Args:
        library: The kernels.
        x: float32 or bfloat16; a token's heads are neighbours, tokens may be apart.
        angles: Cosine and signed sine [T, 1, R] of the first R numbers of a head, of x's dtype.
        interleaved: Pairs are neighbours, not halves.
        norm: Weight [D] and epsilon of a norm of each head before.
    """
    num_tokens, num_heads, dim = x.shape
    cos, sin = angles
    weight, eps = (None, 0.0) if norm is None else norm
    out = torch.empty(x.shape, dtype=x.dtype)
    call = _Rotate(
        *(out.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        None if weight is None else weight.data_ptr(),
        *(num_tokens, x.stride(0), num_heads, dim, cos.shape[-1], interleaved, TYPES[x.dtype], eps),
    )
    library.rotate_heads(ctypes.byref(call))
    return out
