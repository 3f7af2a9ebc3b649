"""The matrix that makes keys and values from a latent vector, which GGUF holds in two parts.

Of keys it has the transposed matrix of each head, so blocks of weights run in the wrong direction
and are turned into numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_traits import ModelError

from vllm_models.gguf.dequantize import dequantize
from vllm_models.gguf.types import GgmlType
from vllm_models.weights.saved import PLAIN_KINDS, SavedTensor


def joined_latent(keys: SavedTensor, values: SavedTensor, name: str) -> SavedTensor:
    """One tensor [heads * (key width + value width), rank] of numbers.

    Args:
        keys: [heads, rank, key width].
        values: [heads, value width, rank].
        name: Of the whole.

    Raises:
        ModelError: The shapes do not belong together.
    """
    fits = len(keys.shape) == len(values.shape) == 3
    if not fits or (keys.shape[0], keys.shape[1]) != (values.shape[0], values.shape[2]):
        raise ModelError(
            f"{keys.source}: {keys.name} is {list(keys.shape)} and {values.name} "
            f"{list(values.shape)}, which do not belong together."
        )
    heads, rank, width = keys.shape

    def read() -> Tensor:
        parts = (_numbers(keys).transpose(1, 2), _numbers(values))
        return torch.cat(parts, dim=1).reshape(-1, rank)

    def release() -> None:
        keys.release()
        values.release()

    shape = (heads * (width + values.shape[1]), rank)
    num_bytes = keys.num_bytes + values.num_bytes
    return SavedTensor(name, shape, "F32", keys.source, num_bytes, read, release)


def _numbers(saved: SavedTensor) -> Tensor:
    if saved.kind in PLAIN_KINDS:
        return saved.read().float()
    return dequantize(saved.read(), GgmlType[saved.kind], saved.shape[-1]).view(saved.shape)
