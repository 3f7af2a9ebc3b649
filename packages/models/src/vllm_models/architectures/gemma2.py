"""Gemma 2: a norm before and after each part, windows in every second layer, capped scores."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import (
    CausalLM,
    DecoderStack,
    MakeBlock,
    MakeStack,
    text_part,
)
from vllm_models.components.linear import Linear
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.norm import OffsetRMSNorm
from vllm_models.components.rotary import RotaryEmbedding, Rotation
from vllm_models.config import ModelConfig
from vllm_models.kernels.paged_attention import paged_attention
from vllm_models.weights.saved import SavedTensor


class GemmaAttention(nn.Module):
    """Attention with a scale of its own and a cap on the scores."""

    def __init__(self, c: ModelConfig, layer: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        self.head_dim = c.head_dim
        self.scale = c.fields.above_zero("query_pre_attn_scalar", float(c.head_dim)) ** -0.5
        self.soft_cap = c.fields.get("attn_logit_softcapping", float, 0.0)
        widths = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        self.qkv_proj = Linear(
            c.hidden_size,
            {name: heads * c.head_dim for name, heads in widths.items()},
            bias=c.attention_bias,
        )
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = OffsetRMSNorm(c.head_dim, c.norm_eps) if qk_norm else None
        self.k_norm = OffsetRMSNorm(c.head_dim, c.norm_eps) if qk_norm else None

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        q, k, v = qkv.split(self.heads, dim=1)  # [T, H, D], [T, K, D], [T, K, D]
        kv, spans = ctx.kv[self.layer], ctx.attention[self.layer]
        q = rotate.write((q, k, v), (self.q_norm, self.k_norm), kv, ctx.slot_mapping)
        out = paged_attention(q, *kv, spans, self.scale, self.soft_cap)  # [T, H, D]
        return self.o_proj(out.flatten(1))


class Gemma2Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = GemmaAttention(c, layer, qk_norm)
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.norm_eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c)
        self.post_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.norm_eps)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        attended = self.post_attention_layernorm(self.self_attn(normed, rotate, ctx))
        x, normed = self.pre_feedforward_layernorm.after(x, attended)
        return x, self.post_feedforward_layernorm(self.mlp(normed))


class GemmaStack(DecoderStack):
    """Scaled embeddings, and a rotation for each of the two kinds of layers."""

    def __init__(self, c: ModelConfig, block: MakeBlock) -> None:
        super().__init__(c, block)
        self.norm = OffsetRMSNorm(c.hidden_size, c.norm_eps)
        self.local_rotary_emb = RotaryEmbedding(c.head_dim, c.local_rope)
        self.windows = c.windows
        self.scale = rounded(c.hidden_size**0.5)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        x = self.embed_tokens(token_ids) * self.scale
        far = self.rotary_emb(ctx.positions, x.dtype)
        near = self.local_rotary_emb(ctx.positions, x.dtype)
        return self.run_layers(x, near, far, ctx)


def rounded(number: float) -> float:
    """What is left of a number in the model's own precision, in which it was trained."""
    return torch.tensor(number, dtype=torch.get_default_dtype(), device="cpu").item()


class GemmaForCausalLM(CausalLM):
    """A Gemma with its output head, whose scores may be capped; also of multimodal checkpoints."""

    def __init__(
        self, config: ModelConfig, block: MakeBlock, stack: MakeStack = GemmaStack
    ) -> None:
        super().__init__(config, block, stack)
        self.soft_cap = config.fields.get("final_logit_softcapping", float, 0.0)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Only what belongs to the text."""
        found = text_part(saved)
        return () if found is None else (found,)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, M] -> [N, V]."""
        scores = super().logits(hidden)
        return scores.div_(self.soft_cap).tanh_().mul_(self.soft_cap) if self.soft_cap else scores


class Gemma2ForCausalLM(GemmaForCausalLM):
    """Gemma 2 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Gemma2Block)
