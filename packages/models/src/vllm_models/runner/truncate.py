"""Top-k, top-p and min-p: which tokens remain possible.

All three become one threshold on the logit, so tokens of equal logit stay or go together and the
result does not depend on how a sort breaks ties. Only the most likely tokens are sorted; the width
grows until everything above every threshold is inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_WIDTH = 64
_GROWTH = 8


class Candidates(NamedTuple):
    """Remaining tokens of each row; those beyond its threshold have a logit of -inf."""

    logits: Tensor  # [n, W]
    token_ids: Tensor  # [n, W]


def truncate(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Candidates:
    """Keep what top-k, then top-p of the rest, then min-p allow.

    Args:
        logits: [n, V], already divided by the temperature.
        top_k: [n] integers; 0 keeps all.
        top_p: [n] in (0, 1].
        min_p: [n] in [0, 1].
    """
    vocab_size = logits.shape[1]
    top_k = torch.where(top_k == 0, vocab_size, top_k).clamp(max=vocab_size)
    total = logits.logsumexp(-1, keepdim=True)
    narrow = top_k[top_k < vocab_size]
    width = max(int(narrow.max()) + 1 if len(narrow) else 0, _FIRST_WIDTH)
    while True:
        width = min(width, vocab_size)
        values, token_ids = logits.topk(width)
        threshold = _threshold(values, total, top_k, top_p, min_p)
        if width == vocab_size or bool((values[:, -1:] < threshold).all()):
            break
        width *= _GROWTH
    return Candidates(values.masked_fill(values < threshold, -torch.inf), token_ids)


def _threshold(
    values: Tensor, total: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The lowest logit [n, 1] that stays, from descending logits [n, W].

    Sums are cumulative, front to back, so they do not depend on the width.
    """
    vocab_or_k = top_k[:, None]
    best = values[:, :1]
    kth = values.gather(1, (vocab_or_k - 1).clamp(max=values.shape[1] - 1))
    is_cut = vocab_or_k <= values.shape[1]
    kth = kth.masked_fill(~is_cut, -torch.inf)
    weights = (values - best).exp().masked_fill(values < kth, 0)
    cumulative = weights.cumsum(-1)
    mass = torch.where(is_cut, cumulative[:, -1:], (total - best).exp())
    before = cumulative - weights
    kept = (before < top_p[:, None] * mass) & (weights > 0)
    kept[:, 0] = True
    nucleus = values.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
    nucleus = nucleus.masked_fill((top_p == 1)[:, None], -torch.inf)
    floor = best + min_p[:, None].log()  # -inf where min-p is off
    return torch.maximum(torch.maximum(kth, nucleus), floor)
