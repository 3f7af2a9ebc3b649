"""Token embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """A vector per token; also an output head when the two are tied."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, M]."""
        return F.embedding(token_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, M] -> [N, V]: how well each token's vector matches."""
        return F.linear(hidden, self.weight)
