"""Attention of Gemma 4, what its layers keep, and how it chooses experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.context import ForwardContext, LayerKV
from vllm_models.components.linear import Linear
from vllm_models.components.norm import RMSNorm, UnitRMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.kernels.kv_write import kv_write
from vllm_models.kernels.paged_attention import paged_attention
from vllm_models.native.tape import as_one


def layer_kv(c: ModelConfig) -> Sequence[LayerKV]:
    """What each layer keeps.

    Raises:
        ModelError: A late layer has nobody to share with.
    """
    first_shared = c.num_layers - c.fields.get("num_kv_shared_layers", int, 0)
    found: list[LayerKV] = []
    for layer, window in enumerate(c.windows):
        head_dim, num_kv_heads = _shape(c, layer)
        source = None
        if layer >= first_shared:
            alike = (i for i in range(first_shared) if bool(c.windows[i]) == bool(window))
            source = max(alike, default=-1)
            if source < 0:
                raise ModelError(f"{c.fields.source}: layer {layer} has no KV to share.")
        found.append(LayerKV(window, num_kv_heads, head_dim, head_dim, source))
    return found


def _shape(c: ModelConfig, layer: int) -> tuple[int, int]:
    """Width and number of the key heads of a layer, which checkpoints tell in two ways."""
    by_layer = c.fields.child("per_layer_config")
    if by_layer is not None:
        own = by_layer.child(str(layer))
        if own is None:
            return c.head_dim, c.num_kv_heads
        num_kv_heads = own.positive("num_key_value_heads", c.num_kv_heads)
        return own.positive("head_dim", c.head_dim), num_kv_heads
    if c.windows[layer]:
        return c.head_dim, c.num_kv_heads
    has_own = c.fields.get("attention_k_eq_v", bool, False)
    found = c.fields.positive("num_global_key_value_heads", c.num_kv_heads)
    return c.fields.positive("global_head_dim"), found if has_own else c.num_kv_heads


class Gemma4Attention(nn.Module):
    """Attention with normalised queries, keys and values.

    A layer may read values from its projected keys, or all KV from an earlier layer.
    """

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        kind = layer_kv(c)[layer]
        self.head_dim, self.is_shared = kind.key_dim, kind.shared_with is not None
        widths = {"q_proj": c.num_heads}
        if not self.is_shared:
            widths["k_proj"] = kind.num_kv_heads
            if kind.window or not c.fields.get("attention_k_eq_v", bool, False):
                widths["v_proj"] = kind.num_kv_heads
        self.heads = tuple(widths.values())
        widths = {name: heads * self.head_dim for name, heads in widths.items()}
        self.qkv_proj = Linear(c.hidden_size, widths, bias=c.attention_bias)
        self.o_proj = Linear(c.num_heads * self.head_dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, c.norm_eps)
        self.k_norm = None if self.is_shared else RMSNorm(self.head_dim, c.norm_eps)
        self.v_norm = UnitRMSNorm(c.norm_eps)

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, *kv = qkv.split(self.heads, dim=1)  # [T, H, D], up to two of [T, K, D]
        q = rotate(self.q_norm(q))
        keys, values = ctx.kv[self.layer]
        if self.k_norm is not None:
            k, v = rotate(self.k_norm(kv[0])), self.v_norm(kv[-1])
            kv_write(k, v, keys, values, ctx.slot_mapping)
        out = paged_attention(q, keys, values, ctx.attention[self.layer], 1.0)  # [T, H, D]
        return self.o_proj(out.flatten(1))


class Gemma4Router(nn.Module):
    """Chooses experts by the normalised stream, each with a scale of its own."""

    def __init__(self, c: ModelConfig, num_experts: int) -> None:
        super().__init__()
        self.num_chosen = c.fields.positive("top_k_experts")
        if self.num_chosen > num_experts:
            raise ModelError(
                f"{c.fields.source}: top_k_experts {self.num_chosen} is more than num_experts "
                f"{num_experts}."
            )
        self.norm = UnitRMSNorm(c.norm_eps)
        self.proj = Linear(c.hidden_size, num_experts)
        self.scale = nn.Parameter(torch.empty(c.hidden_size), requires_grad=False)
        self.per_expert_scale = nn.Parameter(torch.empty(num_experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, M] -> weights and experts [T, num_chosen]."""
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        weights, chosen = as_one(lambda: self._choose(scores))
        return weights, chosen

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E] -> weights and experts [T, num_chosen]."""
        weights, chosen = scores.float().softmax(-1).topk(self.num_chosen)
        weights = weights / weights.sum(-1, keepdim=True) * self.per_expert_scale[chosen]
        return weights.to(scores.dtype), chosen
