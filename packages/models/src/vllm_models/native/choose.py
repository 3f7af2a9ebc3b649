"""Sampling in C: the largest logit of a row, or the winner of its exponential race."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_models.native.library import Library

Key = tuple[int, int]  # of the random numbers of a row, see `runner.noise`
NO_KEY: Key = (0, 0)


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows", "temperatures", "keys")),
        *((name, ctypes.c_void_p) for name in ("scores", "tokens")),
        *((name, ctypes.c_int64) for name in ("count", "size", "stride")),
    )


def choose(
    library: Library,
    logits: Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    keys: Sequence[Key],
) -> tuple[list[float], list[int]]:
    """Winning score, NaN if a score was, and token of some rows.

    Args:
        library: The kernels.
        logits: [N, V] float32; the numbers of a row are neighbours.
        rows: Which rows.
        temperatures: Of each; 0 takes the largest logit, the first of equal ones.
        keys: Of each; not read where the temperature is 0.
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, "rows of float32"
    count = len(rows)
    scores, tokens = (ctypes.c_float * count)(), (ctypes.c_int64 * count)()
    arrays = (
        (ctypes.c_int64 * count)(*rows),
        (ctypes.c_float * count)(*temperatures),
        (ctypes.c_int32 * (2 * count))(*(half for key in keys for half in key)),
        scores,
        tokens,
    )
    call = _Choice(
        logits.data_ptr(),
        *(ctypes.addressof(array) for array in arrays),
        *(count, logits.shape[1], logits.stride(0)),
    )
    if library.choose_tokens(ctypes.byref(call)):
        raise MemoryError("no memory for the choice of tokens")
    return list(scores), list(tokens)
