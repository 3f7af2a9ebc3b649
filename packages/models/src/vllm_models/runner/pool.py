"""From the hidden states of a prompt to one vector.

A prompt may arrive in chunks, so what was seen so far is kept on the row.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from vllm_traits import PoolingParams

from vllm_models.runner.rows import Row


def take_in(row: Row, hidden: Tensor, start: int) -> None:
    """Remember what the pooling needs of a chunk.

    Args:
        row: Of the pooling sequence.
        hidden: [T, M] hidden states of the chunk.
        start: Position of the first one.
    """
    params = row.params
    assert isinstance(params, PoolingParams)
    if start > 0 and row.pooled is None and params.pooling != "last":
        row.failure = "pooling_needs_whole_prompt"
        return
    match params.pooling:
        case "mean":
            total = hidden.float().sum(0)
            row.pooled = total if row.pooled is None else row.pooled + total
        case "last":
            row.pooled = hidden[-1].float()
        case "cls":
            row.pooled = hidden[0].float() if row.pooled is None else row.pooled


def finish(row: Row) -> Tensor:
    """The vector, cut and scaled as asked: [dimensions]."""
    params = row.params
    assert isinstance(params, PoolingParams)
    assert row.pooled is not None
    vector = row.pooled / row.length if params.pooling == "mean" else row.pooled
    vector = vector[: params.dimensions]
    return F.normalize(vector, dim=0) if params.normalize else vector


def read(vector: Tensor) -> tuple[float, ...]:
    """Its numbers; none if they are not finite."""
    return tuple(vector.tolist()) if bool(vector.isfinite().all()) else ()
