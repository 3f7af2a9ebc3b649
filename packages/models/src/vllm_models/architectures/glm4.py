"""GLM-4 (0414): a norm before and after each part; neighbours in half of each head rotate."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig


class Glm4Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer, out_bias=False)
        self.post_self_attn_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c, fused=True)
        self.post_mlp_layernorm = RMSNorm(c.hidden_size, c.norm_eps)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        attended = self.post_self_attn_layernorm(self.self_attn(normed, rotate, ctx))
        x, normed = self.post_attention_layernorm.after(x, attended)
        return x, self.post_mlp_layernorm(self.mlp(normed))


class Glm4ForCausalLM(CausalLM):
    """GLM-4 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Glm4Block)
