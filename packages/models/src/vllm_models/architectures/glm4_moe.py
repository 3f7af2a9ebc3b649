"""GLM-4.5: Qwen3-MoE whose experts are in groups and stand beside one that every token uses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.moe import MixtureOfExperts, Routing, unstack
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.weights.saved import SavedTensor

_LAYER = re.compile(r"model\.layers\.(\d+)\.", re.ASCII)


class GroupedExperts(MixtureOfExperts):
    """Experts chosen by groups, and beside them some that all tokens use."""

    def __init__(self, c: ModelConfig) -> None:
        score = c.fields.get("scoring_func", str, "sigmoid")
        if score != "sigmoid":
            raise ModelError(f"{c.fields.source}: 'scoring_func' is {score!r}, not 'sigmoid'.")
        width = c.fields.positive("moe_intermediate_size")
        routing = Routing(
            c.fields.positive("n_routed_experts"),
            c.fields.positive("num_experts_per_tok"),
            renormalize=c.fields.get("norm_topk_prob", bool, True),
            is_sigmoid=True,
            num_groups=c.fields.positive("n_group", 1),
            num_chosen_groups=c.fields.positive("topk_group", 1),
            scale=c.fields.above_zero("routed_scaling_factor", 1.0),
        )
        super().__init__(c.hidden_size, routing, lambda: GatedMLP(c, width))
        num_shared = c.fields.get("n_shared_experts", int, 0)
        self.shared_experts = GatedMLP(c, width * num_shared) if num_shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        out = super().forward(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


def feed_forward(c: ModelConfig, layer: int) -> nn.Module:
    """The first layers have no experts."""
    is_dense = layer < c.fields.get("first_k_dense_replace", int, 0)
    return GatedMLP(c) if is_dense else GroupedExperts(c)


def split_grouped(saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
    """Experts one by one; nothing of the layers behind the last, which only draft tokens."""
    found = _LAYER.match(saved.name)
    if found and int(found[1]) >= config.num_layers:
        return ()
    name = saved.name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")
    return unstack(saved._replace(name=name))


class Glm4MoeBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        qk_norm = c.fields.get("use_qk_norm", bool, False)
        self.self_attn = Attention(c, layer, qk_norm=qk_norm, out_bias=False)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = feed_forward(c, layer)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class Glm4MoeForCausalLM(CausalLM):
    """GLM-4.5 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Glm4MoeBlock)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one, without layers that draft."""
        return split_grouped(saved, config)
