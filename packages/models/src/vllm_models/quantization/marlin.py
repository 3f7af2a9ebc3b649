"""The order in which Marlin stores 4-bit weights for the tensor cores, undone.

The weight [K, O] is cut into tiles of 16 x 16 that are stored row by row; within four neighbouring
tiles the 1024 codes follow the registers of a warp, and within eight codes the even ones come
first. Scales are shuffled within 64 columns, or 32 if there is one group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vllm_models.quantization.grouped import unpack_codes, word_bytes

TILE = 16
CHUNK = 64  # columns that are shuffled together
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_marlin(words: Tensor) -> Tensor:
    """int32 [K/16, 2 * O] -> codes uint8 [O, K]."""
    num_tiles = len(words)
    stored = unpack_codes(word_bytes(words), 4).view(-1, CHUNK * TILE)
    codes = torch.empty_like(stored)
    codes[:, _code_order()] = stored
    tiles = codes.view(num_tiles, -1, TILE, TILE)  # [K/16, O/16, k, o]
    return tiles.permute(1, 3, 0, 2).reshape(-1, num_tiles * TILE)


def unpack_marlin_scales(stored: Tensor) -> Tensor:
    """[K/G, O] -> [O, K/G]."""
    order = _scale_order(len(stored) == 1)
    chunks = stored.reshape(-1, len(order))
    scales = torch.empty_like(chunks)
    scales[:, order] = chunks
    return scales.view(stored.shape).T


@cache
def _code_order() -> Tensor:
    """Which code of the tiles is stored at each of 1024 places."""
    order: list[int] = []
    for thread in range(32):
        column, pair = thread // 4, 2 * (thread % 4)
        rows = (pair, pair + 1, pair + 8, pair + 9)
        own = [TILE * row + column + half for half in (0, 8) for row in rows]
        for tile in range(4):
            order += [code + tile * TILE * TILE for code in own]
    return torch.tensor(order).view(-1, 8)[:, _EVEN_FIRST].flatten()


@cache
def _scale_order(is_single: bool) -> Tensor:
    if is_single:
        steps = (0, 1, 8, 9, 16, 17, 24, 25)
        return torch.tensor([2 * i + step for i in range(4) for step in steps])
    return torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
