"""OLMo 3: OLMo 2 with a window in three of four layers, where nothing is stretched."""

from __future__ import annotations

from vllm_models.architectures.olmo2 import Olmo2ForCausalLM


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """OLMo 3 with its output head; windows and rotations of the layers are in the config."""
