"""How values differ between GGUF and Hugging Face checkpoints; works on rows, quantized or not.

A head's rotary halves: Hugging Face rotates element i with element i + D/2, so a head's rows are
two halves. GGUF files of the `llama` architecture rotate neighbours, so their rows alternate
between the halves: row 2i is i of the first half, row 2i + 1 is i of the second.
"""

from __future__ import annotations

from torch import Tensor


def halves_from_pairs(rows: Tensor, num_heads: int) -> Tensor:
    """From the order of GGUF to that of Hugging Face: [heads * D, ...], the same shape."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def pairs_from_halves(rows: Tensor, num_heads: int) -> Tensor:
    """From the order of Hugging Face to that of GGUF: [heads * D, ...], the same shape."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
