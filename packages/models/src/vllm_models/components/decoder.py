"""What the runner needs of an architecture: hidden states of a step, and logits of some of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from vllm_models.components.context import ForwardContext
from vllm_models.config import ModelConfig


class Decoder(nn.Module, ABC):
    """A causal language model whose parameters are named as in its checkpoint."""

    @abstractmethod
    def __init__(self, config: ModelConfig) -> None:
        """Build empty layers; the loader fills them."""
        super().__init__()

    @abstractmethod
    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Final hidden states of a step: [T] -> [T, M]."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary after some hidden states: [N, M] -> [N, V]."""
