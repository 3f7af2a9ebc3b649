"""Qwen3-MoE: Qwen3 with a mixture of experts in most layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from vllm_models.architectures.qwen2_moe import experts, is_sparse
from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.moe import unstack
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.weights.saved import SavedTensor


class Qwen3MoeBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer, qk_norm=True)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = experts(c) if is_sparse(c, layer) else GatedMLP(c)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3-MoE with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Qwen3MoeBlock)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one."""
        return unstack(saved)
