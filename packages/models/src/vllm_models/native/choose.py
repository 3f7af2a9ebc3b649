"""Sampling in C: the largest logit of a row, or the winner of its exponential race."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from vllm_models.native.library import Library


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "temperatures", "keys")),
        *((name, ctypes.c_void_p) for name in ("scores", "tokens")),
        *((name, ctypes.c_int64) for name in ("count", "size", "stride")),
    )


def choose(
    library: Library, logits: Tensor, rows: Tensor, temperatures: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Winning score [n] float32, NaN if a score was, and token [n] int64 of some rows.

    Args:
        library: The kernels.
        logits: [N, V] float32; the numbers of a row are neighbours.
        rows: [n] int64 which rows.
        temperatures: [n] float32; 0 takes the largest logit, the first of equal ones.
        keys: [n, 2] int32 from `noise.keys`; not read where the temperature is 0.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, "rows of float32"
    scores, tokens = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int64)
    call = _Choice(
        *(tensor.data_ptr() for tensor in (logits, rows, temperatures, keys, scores, tokens)),
        *(len(rows), logits.shape[1], logits.stride(0)),
    )
    if library.choose_tokens(ctypes.byref(call)):
        raise MemoryError("no memory for the choice of tokens")
    return scores, tokens
