"""Gemma 3: Gemma 2 with normalised query and key heads, and rotations of two wavelengths."""

from __future__ import annotations

from functools import partial

from vllm_models.architectures.gemma2 import Gemma2Block, GemmaForCausalLM
from vllm_models.config import ModelConfig


class Gemma3ForCausalLM(GemmaForCausalLM):
    """Gemma 3 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, partial(Gemma2Block, qk_norm=True))
