"""Paged attention and KV writes in C; the layout of the KV is told in attention.h.

With units of 32 bits (U = 2 bf16 numbers, or 1 float32) the pool's tensors are

    keys    [B, K, P / 16, D / U, 16, U]
    values  [B, K, P / U, W, U]

Of int8 they have the same shapes, and scales float32 [B, K, P] beside them.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.native.library import Library

LANES = 16  # tokens side by side; a block holds a multiple of it
MAX_DIM = 576
Stored = tuple[Tensor, Tensor | None]  # numbers, and their scales if they are int8


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "q", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales", "tables", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("q_stride", "table_width", "num_heads", "num_kv_heads", "group")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("key_dim", "value_dim", "block_size", "window", "num_threads")
        ),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


class _KVWrite(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "values", "key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "slots")),
        *(
            (name, ctypes.c_int64)
            for name in ("num_tokens", "num_kv_heads", "key_dim", "value_dim", "block_size")
        ),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
    )


class Spans(NamedTuple):
    """Who attends to what in a step.

    Attributes:
        spans: [S, 3] int64: row of the tables, queries, context length; in the order of queries.
        tables: [rows, N] int64 blocks.
        window: Positions a query looks back, its own included; 0 is all.
    """

    spans: Tensor
    tables: Tensor
    window: int


def fits(block_size: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can serve KV of this shape for queries of a type."""
    return (
        dtype in (torch.bfloat16, torch.float32)
        and block_size % LANES == 0
        and key_dim % 2 == 0
        and value_dim > 0
        and value_dim % LANES == 0
        and max(key_dim, value_dim) <= MAX_DIM
    )


def block_shapes(
    block_size: int, num_kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the keys and of the values of one block, for queries of a type."""
    unit = 4 // dtype.itemsize
    keys = (num_kv_heads, block_size // LANES, key_dim // unit, LANES, unit)
    return keys, (num_kv_heads, block_size // unit, value_dim, unit)


def attend(
    library: Library,
    q: Tensor,
    keys: Stored,
    values: Stored,
    spans: Spans,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """[T, H, D] -> [T, H, W].

    Args:
        library: The kernels.
        q: [T, H, D]; a token's heads are neighbours, tokens may be apart.
        keys: As told above.
        values: As told above.
        spans: Queries, tables and window.
        scale: Of the scores.
        soft_cap: Scores s become cap * tanh(s / cap); 0 leaves them.
        sinks: [H]: a score of nothing, beside those of the keys.

    Raises:
        MemoryError: None is left for the partial sums.
    """
    (num_tokens, num_heads, key_dim), dtype = q.shape, q.dtype
    num_kv_heads, value_dim = values[0].shape[1], values[0].shape[3]
    block_size = keys[0].shape[2] * LANES
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=dtype)
    per_unit = 4 // q.element_size()
    sinks = None if sinks is None else sinks.float()
    call = _Attention(
        *(out.data_ptr(), q.data_ptr(), *_addresses(keys, values)),
        *(spans.tables.data_ptr(), None if sinks is None else sinks.data_ptr()),
        *(q.stride(0) // per_unit, spans.tables.stride(0)),
        *(num_heads, num_kv_heads, num_heads // num_kv_heads),
        *(key_dim, value_dim, block_size, spans.window, torch.get_num_threads()),
        *(scale, soft_cap),
    )
    run = library.attention_bf16 if dtype == torch.bfloat16 else library.attention_f32
    if not run(ctypes.byref(call), spans.spans.data_ptr(), len(spans.spans)):
        raise MemoryError("no memory for the partial sums of attention")
    return out


def write_kv(
    library: Library, k: Tensor, v: Tensor | None, keys: Stored, values: Stored, slots: Tensor
) -> None:
    """Put the keys and values of a step into their blocks.

    Args:
        library: The kernels.
        k: [T, K, D]; a token's heads are neighbours.
        v: [T, K, W], or None where values are read from the keys.
        keys: As told above.
        values: As told above.
        slots: [T] int64: block * P + offset.
    """
    num_tokens, num_kv_heads, key_dim = k.shape
    call = _KVWrite(
        *_addresses(keys, values),
        *(k.data_ptr(), None if v is None else v.data_ptr()),
        *(
            slots.data_ptr(),
            num_tokens,
            num_kv_heads,
            key_dim,
            values[0].shape[3],
            keys[0].shape[2] * LANES,
        ),
        *(k.stride(0), 0 if v is None else v.stride(0)),
    )
    write = library.kv_write_bf16 if k.dtype == torch.bfloat16 else library.kv_write_f32
    write(ctypes.byref(call))


def _addresses(keys: Stored, values: Stored) -> tuple[int | None, ...]:
    """Of the numbers, then of the scales."""
    scales = (None if side[1] is None else side[1].data_ptr() for side in (keys, values))
    return keys[0].data_ptr(), values[0].data_ptr(), *scales
