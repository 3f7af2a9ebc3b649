"""Sampling in C: the largest logit of a row, or the winner of its exponential race."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.native.library import Library


class Draw(NamedTuple):
    """How a row chooses.

    Attributes:
        temperature: 0 takes the largest logit, the first of equal ones; nothing else counts then.
        top_k: 0 keeps all.
        top_p: In (0, 1].
        min_p: In [0, 1].
        key: Of its random numbers, see `runner.noise`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: tuple[int, int] = (0, 0)


GREEDY = Draw()


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "temperatures", "top_k", "top_p")),
        *((name, ctypes.c_void_p) for name in ("min_p", "keys", "scores", "tokens")),
        *((name, ctypes.c_int64) for name in ("count", "size", "stride")),
    )


def choose(
    library: Library, logits: Tensor, draws: Sequence[Draw]
) -> tuple[list[float], list[int]]:
    """Winning score, NaN if a score was, and token of every row.

    Args:
        library: The kernels.
        logits: [N, V] float32; the numbers of a row are neighbours.
        draws: [N].
    """
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, "rows of float32"
    count = len(draws)
    temperatures, top_k, top_p, min_p, keys = zip(*draws, strict=True)
    scores, tokens = (ctypes.c_float * count)(), (ctypes.c_int64 * count)()
    arrays = (
        (ctypes.c_float * count)(*temperatures),
        (ctypes.c_int64 * count)(*top_k),
        (ctypes.c_float * count)(*top_p),
        (ctypes.c_float * count)(*min_p),
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
