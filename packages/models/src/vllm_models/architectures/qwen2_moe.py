"""Qwen2-MoE: Qwen2 with experts in most layers, beside one that every token uses."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.moe import MixtureOfExperts, Routing, unstack
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.weights.saved import SavedTensor


def is_sparse(c: ModelConfig, layer: int) -> bool:
    """Whether a layer has experts: each `decoder_sparse_step`-th, save `mlp_only_layers`."""
    step = c.fields.positive("decoder_sparse_step", 1)
    return layer not in c.fields.get("mlp_only_layers", list, []) and (layer + 1) % step == 0


def experts(c: ModelConfig, shared: nn.Module | None = None) -> MixtureOfExperts:
    """The mixture of a sparse layer, beside an expert that all tokens share if there is one."""
    width = c.fields.positive("moe_intermediate_size")
    num_experts = c.fields.get("num_experts", int, 0) or c.fields.positive("num_local_experts")
    return MixtureOfExperts(
        c.hidden_size,
        Routing(
            num_experts,
            c.fields.positive("num_experts_per_tok"),
            renormalize=c.fields.get("norm_topk_prob", bool, False),
        ),
        expert=lambda: GatedMLP(c, width),
        shared=shared,
    )


def _experts_and_shared(c: ModelConfig) -> MixtureOfExperts:
    return experts(c, GatedMLP(c, c.fields.positive("shared_expert_intermediate_size")))


class Qwen2MoeBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer, qkv_bias=c.fields.get("qkv_bias", bool, True))
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = _experts_and_shared(c) if is_sparse(c, layer) else GatedMLP(c)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class Qwen2MoeForCausalLM(CausalLM):
    """Qwen2-MoE with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Qwen2MoeBlock)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one."""
        return unstack(saved)
