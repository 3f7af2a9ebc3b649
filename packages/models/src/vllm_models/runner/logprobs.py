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
    return entries(token_ids, num_top, (chosen[:, 0], ranks, ids, values))


def entries(
    token_ids: Sequence[int], num_top: Sequence[int], scores: Sequence[Tensor]
) -> list[TokenLogprobs]:
    """The same from tensors.

    Args:
        token_ids: [n].
        num_top: [n].
        scores: Log-probabilities [n] and ranks [n] of the tokens, and ids [n, W] and
            log-probabilities [n, W] of the most likely ones.
    """
    columns = (tensor.tolist() for tensor in scores)
    return [
        TokenLogprobs(token, value, rank, tuple(zip(top[:n], top_values[:n], strict=True)))
        for token, n, value, rank, top, top_values in zip(token_ids, num_top, *columns, strict=True)
    ]
