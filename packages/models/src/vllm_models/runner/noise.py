"""Random numbers that are a function of seed, position and token id, and of nothing else.

A counter-based generator has no state: the same request draws the same numbers alone, in a batch,
after a preemption and on another machine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1
_MASK_32 = (1 << 32) - 1
_BLOCK_ELEMENTS = 1 << 16  # hashed at once: the temporaries stay in the processor's cache


def _mix_64(x: int) -> int:
    """Spread the bits of a 64-bit integer over all of it, one to one."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK_64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The low 32 bits as a signed integer, the only 32-bit kind that every device multiplies."""
    return ((x & _MASK_32) ^ (1 << 31)) - (1 << 31)


def key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys, of a pair of seed and position."""
    mixed = _mix_64((_mix_64(seed & _MASK_64) + position * 0x9E3779B97F4A7C15) & _MASK_64)
    return _signed(mixed), _signed(mixed >> 32)


def keys(draws: Iterable[tuple[int, int]], device: torch.device) -> Tensor:
    """Keys [n, 2] of some pairs of seed and position."""
    return torch.tensor([key(*draw) for draw in draws], dtype=torch.int32, device=device)


def exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Draws from the exponential distribution of rate 1.

    Args:
        keys: [n, 2] from `keys`.
        token_ids: [n, W] or [1, W] int32.

    Returns:
        [n, W] float32, positive and finite.
    """
    out = torch.empty(len(keys), token_ids.shape[1], device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // token_ids.shape[1])
    for first in range(0, len(keys), size):
        block = slice(first, first + size)
        ids = token_ids if len(token_ids) == 1 else token_ids[block]
        _draw(keys[block], ids, out[block])
    return out


def _draw(keys: Tensor, token_ids: Tensor, out: Tensor) -> None:
    """Hash, then map 31 bits to (0, 1), where small values keep their precision, and invert."""
    x = token_ids * _signed(0x9E3779B1) + keys[:, :1]
    _fold(x, 16).mul_(_signed(0x21F0AAAD))
    _fold(x, 15).bitwise_xor_(keys[:, 1:]).mul_(_signed(0xD35A2D97))
    _fold(x, 15).bitwise_and_(0x7FFFFFFF)
    torch.mul(x, 2.0**-31, out=out)
    out.add_(2.0**-32).clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def _fold(x: Tensor, shift: int) -> Tensor:
    """x ^= x >> shift without the sign, in place."""
    return x.bitwise_xor_((x >> shift).bitwise_and_(_MASK_32 >> shift))
