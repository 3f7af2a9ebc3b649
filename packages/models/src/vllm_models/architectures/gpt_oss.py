"""gpt-oss: experts in every layer, windows in every second one, and sinks that attention may fall
into instead of any key.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import CausalLM
from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear
from vllm_models.components.moe import check_count
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.gpu.launch import kernels_for
from vllm_models.kernels.clamped_swiglu import clamped_swiglu
from vllm_models.kernels.paged_attention import paged_attention
from vllm_models.native.tape import as_one
from vllm_models.weights.saved import SavedTensor


class GptOssAttention(nn.Module):
    """Attention with biases and a sink for each query head."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        self.head_dim = c.head_dim
        self.scale = c.head_dim**-0.5
        widths = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
        self.qkv_proj = Linear(
            c.hidden_size,
            {name: heads * c.head_dim for name, heads in widths.items()},
            bias=c.attention_bias,
        )
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=c.attention_bias)
        self.sinks = nn.Parameter(torch.empty(c.num_heads), requires_grad=False)

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        q, k, v = qkv.split(self.heads, dim=1)  # [T, H, D], [T, K, D], [T, K, D]
        kv, spans = ctx.kv[self.layer], ctx.attention[self.layer]
        q = rotate.write((q, k, v), (None, None), kv, ctx.slot_mapping)
        out = paged_attention(q, *kv, spans, self.scale, sinks=self.sinks)  # [T, H, D]
        return self.o_proj(out.flatten(1))


class GptOssExpert(nn.Module):
    """down((up(x) + 1) * swish(gate(x))) with limits on both."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        alpha = c.fields.get("swiglu_alpha", float, 1.702)
        limit = c.fields.above_zero("swiglu_limit", 7.0)
        self.activate = partial(clamped_swiglu, alpha=alpha, limit=limit)
        widths = {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size}
        self.gate_up_proj = Linear(c.hidden_size, widths, bias=True)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, M] -> [N, M]."""
        return self.down_proj(self.activate(self.gate_up_proj(x)))


class GptOssMLP(nn.Module):
    """Experts whose weights are a softmax over those that were chosen."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        num_experts = c.fields.positive("num_local_experts")
        check_count(num_experts)
        self.num_chosen = c.fields.positive("num_experts_per_tok", 4)
        if self.num_chosen > num_experts:
            raise ModelError(
                f"{c.fields.source}: num_experts_per_tok {self.num_chosen} is more than "
                f"num_local_experts {num_experts}."
            )
        self.router = Linear(c.hidden_size, num_experts, bias=True)
        self.experts = Experts(GptOssExpert(c) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        logits = self.router(x)  # [T, E]
        if (gpu := kernels_for(x)) is not None:  # a softmax of the chosen: all others cancel out
            return self.experts(x, *gpu.choose_experts(logits, self.num_chosen, True))
        return self.experts(x, *as_one(lambda: self._choose(logits)))

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, and which experts: [T, E] -> [T, num_chosen]."""
        scores, chosen = logits.topk(self.num_chosen)
        return scores.float().softmax(-1).to(logits.dtype), chosen


class GptOssBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = GptOssAttention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GptOssMLP(c)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class GptOssForCausalLM(CausalLM):
    """gpt-oss with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, GptOssBlock)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one; gates and ups alternate in the stacks."""
        path, _, name = saved.name.rpartition(".experts.")
        stack, _, suffix = name.partition("_proj")
        if not path or stack not in ("gate_up", "down") or "." in suffix:
            return (saved,)
        is_dense = not suffix  # [E, in, out]; everything else has outputs first
        steps = {"gate": (0, 2), "up": (1, 2)} if stack == "gate_up" else {"down": (0, 1)}
        shape = (saved.shape[2], saved.shape[1]) if is_dense else saved.shape[1:]
        return (
            saved.part(
                f"{path}.experts.{expert}.{part}_proj.{suffix.removeprefix('_') or 'weight'}",
                (shape[0] // step, *shape[1:]),
                lambda t, e=expert, f=first, s=step: (t[e].T if is_dense else t[e])[f::s],
            )
            for expert in range(saved.shape[0])
            for part, (first, step) in steps.items()
        )
