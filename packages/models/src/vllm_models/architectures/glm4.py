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

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        attended = self.self_attn(self.input_layernorm(x), rotate, ctx)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class Glm4ForCausalLM(CausalLM):
    """GLM-4 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Glm4Block)
