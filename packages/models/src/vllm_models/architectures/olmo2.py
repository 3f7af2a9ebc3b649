"""OLMo 2: norms after each part instead of before, and over all query and all key heads at once."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig


class OlmoAttention(Attention):
    """Attention whose heads are normalised together."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__(c, layer)
        self.widths = [heads * c.head_dim for heads in self.heads]
        self.q_norm = RMSNorm(self.widths[0], c.norm_eps)
        self.k_norm = RMSNorm(self.widths[1], c.norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, M] -> queries [T, H, D], keys and values [T, K, D], before the rotation."""
        q, k, v = self.qkv_proj(x).split(self.widths, dim=1)
        heads = (len(x), -1, self.head_dim)
        return self.q_norm(q).view(heads), self.k_norm(k).view(heads), v.view(heads)


class Olmo2Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = OlmoAttention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.norm_eps)

    def forward(
        self, x: Tensor, added: None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, None]:
        """[T, M] -> [T, M], to which nothing is to be added: the next layer has no norm first."""
        x = x + self.post_attention_layernorm(self.self_attn(x, rotate, ctx))
        return x + self.post_feedforward_layernorm(self.mlp(x)), None


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Olmo2Block)
