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
        top_p: In (0, 1].
        min_p: In [0, 1].
        key: Of its random numbers, see `runner.noise`.
        top_k: 0 keeps all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    key: tuple[int, int] = (0, 0)
    top_k: int = 0


GREEDY = Draw()


class _Draw(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
        ("key", ctypes.c_int32 * 2),
        ("top_k", ctypes.c_int64),
    )


class _Winner(ctypes.Structure):
    _fields_ = (("score", ctypes.c_float), ("token", ctypes.c_int64))


class _Choice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "draws", "winners")),
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
    stride, step = logits.stride()
    assert logits.dtype == torch.float32 and step == 1, "rows of float32"
    count = len(draws)
    given, winners = (_Draw * count)(*draws), (_Winner * count)()
    addresses = (logits.data_ptr(), ctypes.addressof(given), ctypes.addressof(winners))
    call = _Choice(*addresses, count, logits.shape[1], stride)
    if library.choose_tokens(ctypes.byref(call)):
        raise MemoryError("no memory for the choice of tokens")
    return [winner.score for winner in winners], [winner.token for winner in winners]
