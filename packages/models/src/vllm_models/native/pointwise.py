"""The small work between products, in C: normalisation, gates, rotary positions.

A row's result does not depend on the other rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_models.native.library import Library
from vllm_models.native.packed import TYPES, address

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


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
    )


class _Rotate(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "q_weight", "k_weight")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "stride", "num_q_heads")),
        *((name, ctypes.c_int64) for name in ("num_k_heads", "dim", "rotated")),
        ("interleaved", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("offset", ctypes.c_float),
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
    library.rms_norm(address(call))
    return out


def gate(library: Library, gate_up: Tensor, activation: str) -> Tensor:
    """activation(first half) * second half: [T, 2F] -> [T, F].

    Args:
        library: The kernels.
        gate_up: float32 or bfloat16; the numbers of a row are neighbours.
        activation: One of `ACTIVATIONS`.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    call = _Gate(
        *(out.data_ptr(), gate_up.data_ptr(), rows, width, gate_up.stride(0)),
        *(TYPES[gate_up.dtype], ACTIVATIONS[activation]),
    )
    library.gate_rows(address(call))
    return out


def rotate_heads(
    library: Library,
    heads: Tensor,
    num_q_heads: int,
    angles: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float] | None = None,
    interleaved: bool = False,
) -> None:
    """Turn query and key heads in place.

    Args:
        library: The kernels.
        heads: [T, H + K, D], queries first; a token's heads are neighbours.
        num_q_heads: H.
        angles: Cosine and signed sine [T, 1, R] of the first R numbers of a head, of its dtype.
        norm: Weights [D] of queries and keys and an epsilon: each head is normalised before.
        interleaved: Pairs are neighbours, not halves.
    """
    num_tokens, num_heads, dim = heads.shape
    cos, sin = angles
    q_weight, k_weight, eps = (None, None, 0.0) if norm is None else norm
    call = _Rotate(
        *(heads.data_ptr(), cos.data_ptr(), sin.data_ptr()),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        *(num_tokens, heads.stride(0), num_q_heads, num_heads - num_q_heads, dim),
        *(cos.shape[-1], interleaved, TYPES[heads.dtype], eps, 0.0),
    )
    library.rotate_heads(address(call))
