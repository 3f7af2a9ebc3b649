"""Quantize a whole weight, one type for all rows, in tiles.

On a CPU tiles fit its cache, and threads take different tiles, each alone: that needs no barrier
after every operation, as threads would that share one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_models.gguf.quantize import kquants, plain
from vllm_models.gguf.types import GgmlType, block_size, row_bytes

_CPU_TILE = 128 << 10  # weights
_DEVICE_TILE = 1 << 24
_SHARE = 1 << 20  # weights that are worth a thread
_LARGEST = 1e9  # beyond what any type holds, and its square fits float32
_CASTS = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}
_QUANTIZERS: Mapping[GgmlType, Callable[[Tensor], Tensor]] = {
    GgmlType.Q4_0: plain.q4_0,
    GgmlType.Q4_1: plain.q4_1,
    GgmlType.Q5_0: plain.q5_0,
    GgmlType.Q5_1: plain.q5_1,
    GgmlType.Q8_0: plain.q8_0,
    GgmlType.Q2_K: kquants.q2_k,
    GgmlType.Q3_K: kquants.q3_k,
    GgmlType.Q4_K: kquants.q4_k,
    GgmlType.Q5_K: kquants.q5_k,
    GgmlType.Q6_K: kquants.q6_k,
}


def quantize(weight: Tensor, kind: GgmlType, out: Tensor | None = None) -> Tensor:
    """[R, K] of any float type -> uint8 [R, bytes per row].

    Args:
        weight: K is a whole number of blocks.
        kind: A block type that can be written, or F32, F16 or BF16.
        out: Where the blocks go, contiguous.

    Raises:
        ValueError: A weight is infinite or no number, or the row is no whole number of blocks.
    """
    width = row_bytes(kind, weight.shape[1])
    if out is None:
        out = torch.empty((len(weight), width), dtype=torch.uint8, device=weight.device)
    if kind in _CASTS:
        out.copy_(weight.to(_CASTS[kind]).contiguous().view(torch.uint8).view(len(weight), width))
        return out
    blocks = weight.reshape(-1, block_size(kind))
    held = out.view(len(blocks), -1)
    if weight.device.type != "cpu":
        _quantize_blocks(blocks, kind, held)
        return out
    with _one_thread_each() as threads:
        count = max(1, min(threads, blocks.numel() // _SHARE))
        shares = zip(blocks.chunk(count), held.chunk(count), strict=True)
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(_quantize_blocks, some, kind, to) for some, to in shares]:
                done.result()
    return out


@contextmanager
def _one_thread_each() -> Generator[int]:
    """Threads that start inside compute alone; gives how many torch would have used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _quantize_blocks(blocks: Tensor, kind: GgmlType, held: Tensor) -> None:
    """[N, block size] -> [N, bytes per block]."""
    step = (_CPU_TILE if blocks.device.type == "cpu" else _DEVICE_TILE) // blocks.shape[1]
    for first in range(0, len(blocks), step):
        tile = _checked(blocks[first : first + step].float())
        held[first : first + step] = _QUANTIZERS[kind](tile)


def _checked(tile: Tensor) -> Tensor:
    low, high = torch.aminmax(tile)
    most = float(torch.maximum(high, -low))
    if not most < float("inf"):
        raise ValueError("holds weights that are infinite or not a number")
    return tile if most < _LARGEST else tile.clamp(-_LARGEST, _LARGEST)
