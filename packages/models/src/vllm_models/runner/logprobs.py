"""Log-probabilities of tokens that stand somewhere, with their rank and the most likely ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from vllm_traits import TokenLogprobs


def describe(
    logprobs: Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """What to report for each row.

    Args:
        logprobs: [n, V] of the model, before any change.
        token_ids: [n] the token that stands there.
        num_top: [n] how many of the most likely tokens to list.
    """
    chosen = logprobs.gather(1, logprobs.new_tensor(token_ids).long()[:, None])
    ranks = (logprobs > chosen).sum(-1) + 1
    values, ids = logprobs.topk(min(max(num_top), logprobs.shape[1]))
    rows = zip(
        token_ids,
        chosen[:, 0].tolist(),
        ranks.tolist(),
        num_top,
        ids.tolist(),
        values.tolist(),
        strict=True,
    )
    return [
        TokenLogprobs(token, value, rank, tuple(zip(top[:n], top_values[:n], strict=True)))
        for token, value, rank, n, top, top_values in rows
    ]
