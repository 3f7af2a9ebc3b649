"""Token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.components.linear import Linear


class Embedding(Linear):
    """A vector per token, [vocab_size, width]; also an output head when the two are tied.

    Held like the weight of any linear layer, so that it may be quantized.

    Args:
        vocab_size: Number of vectors.
        width: Of each.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(width, vocab_size)
        self.dtype = torch.get_default_dtype()

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, M]."""
        return self.method.gather(self, token_ids).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, M] -> [N, V]: how well each token's vector matches."""
        return self.scores(hidden)
