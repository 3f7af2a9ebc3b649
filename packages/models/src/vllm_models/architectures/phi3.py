"""Phi-3 and Phi-4: Llama whose checkpoints have stacked projections; parts of heads may rotate."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig


class Phi3Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer, fused=True)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c, fused=True)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class Phi3ForCausalLM(CausalLM):
    """Phi-3 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Phi3Block)
