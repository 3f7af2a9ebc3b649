"""Mixtral: Mistral with a mixture of experts in the place of the feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.linear import Linear
from vllm_models.components.mlp import ACTIVATIONS
from vllm_models.components.moe import MixtureOfExperts, Routing
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig


class MixtralExpert(nn.Module):
    """w2(activation(w1(x)) * w3(x))."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[c.activation]
        self.w13 = Linear(c.hidden_size, {"w1": c.intermediate_size, "w3": c.intermediate_size})
        self.w2 = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M] -> [N, M]."""
        return self.w2(self.activate(self.w13(x)))


class MixtralBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.block_sparse_moe = MixtureOfExperts(
            c.hidden_size,
            Routing(
                c.fields.positive("num_local_experts", 8),
                c.fields.positive("num_experts_per_tok", 2),
                renormalize=True,
            ),
            expert=lambda: MixtralExpert(c),
        )

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.block_sparse_moe(normed)


class MixtralForCausalLM(CausalLM):
    """Mixtral with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, MixtralBlock)
