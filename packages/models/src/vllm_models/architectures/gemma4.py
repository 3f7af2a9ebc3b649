"""Gemma 4 (text): wider heads in layers without a window, and by variant a table of inputs for each
layer, late layers that read the KV of earlier ones, and experts beside the feed-forward layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from vllm_traits import ModelError

from vllm_models.architectures.gemma2 import GemmaForCausalLM, rounded
from vllm_models.architectures.gemma4_parts import Gemma4Attention, Gemma4Router, layer_kv
from vllm_models.components.context import ForwardContext, LayerKV
from vllm_models.components.decoder import DecoderStack, MakeBlock
from vllm_models.components.embedding import Embedding
from vllm_models.components.experts import Experts
from vllm_models.components.linear import Linear
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.moe import check_count, unstack
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import RotaryEmbedding, Rotation
from vllm_models.config import ModelConfig
from vllm_models.kernels.gelu_mul import gelu_mul
from vllm_models.weights.saved import SavedTensor

_UNREAD = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:[kv]_proj|k_norm)\.weight", re.ASCII)


class Gemma4Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = lambda: RMSNorm(c.hidden_size, c.norm_eps)  # noqa: E731 - the same everywhere
        is_wide = c.fields.get("use_double_wide_mlp", bool, False)
        is_shared = layer_kv(c)[layer].shared_with is not None
        self.input_layernorm = norm()
        self.self_attn = Gemma4Attention(c, layer)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GatedMLP(c, c.intermediate_size * (2 if is_wide and is_shared else 1))
        self.post_feedforward_layernorm = norm()
        self.router = None
        if c.fields.get("enable_moe_block", bool, False):
            num_experts = c.fields.positive("num_experts")
            check_count(num_experts)
            width = c.fields.positive("moe_intermediate_size")
            self.router = Gemma4Router(c, num_experts)
            self.experts = Experts(GatedMLP(c, width) for _ in range(num_experts))
            self.post_feedforward_layernorm_1 = norm()
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_2 = norm()
        self.layer_scalar = nn.Parameter(torch.empty(1), requires_grad=False)
        width = c.fields.get("hidden_size_per_layer_input", int, 0)
        self.per_layer_input_gate = Linear(c.hidden_size, width) if width else None
        self.per_layer_projection = Linear(width, c.hidden_size) if width else None
        self.post_per_layer_input_norm = norm() if width else None

    def forward(
        self, x: Tensor, rotate: Rotation, ctx: ForwardContext, own_input: Tensor | None
    ) -> Tensor:
        """[T, M], and the layer's own input [T, I] -> [T, M]."""
        attended = self.self_attn(self.input_layernorm(x), rotate, ctx)
        attended = self.post_attention_layernorm(attended)
        x, normed = self.pre_feedforward_layernorm.after(x, attended)
        out = self.mlp(normed)
        if self.router is not None:
            answers = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
            out = self.post_feedforward_layernorm_1(out)
            out = out + self.post_feedforward_layernorm_2(answers)
        x = x + self.post_feedforward_layernorm(out)
        if own_input is not None:
            gated = gelu_mul(torch.cat((self.per_layer_input_gate(x), own_input), -1))
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar


class Gemma4Stack(DecoderStack):
    """Scaled embeddings, a rotation for each kind of layer, and the inputs of single layers."""

    def __init__(self, c: ModelConfig, block: MakeBlock) -> None:
        super().__init__(c, block)
        kinds = layer_kv(c)
        far = next((kind.key_dim for kind in kinds if not kind.window), c.head_dim)
        self.windows = c.windows
        self.scale = rounded(c.hidden_size**0.5)
        self.rotary_emb = RotaryEmbedding(far, c.rope)
        self.local_rotary_emb = RotaryEmbedding(c.head_dim, c.local_rope)
        self.own_width = width = c.fields.get("hidden_size_per_layer_input", int, 0)
        if width:
            vocab_size = c.fields.positive("vocab_size_per_layer_input")
            if vocab_size < c.vocab_size:
                raise ModelError(
                    f"{c.fields.source}: vocab_size_per_layer_input {vocab_size} is less than "
                    f"vocab_size {c.vocab_size}."
                )
            self.own_scale = rounded(width**0.5)
            self.embed_tokens_per_layer = Embedding(vocab_size, c.num_layers * width)
            self.per_layer_model_projection = Linear(c.hidden_size, c.num_layers * width)
            self.per_layer_projection_norm = RMSNorm(width, c.norm_eps)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        x = self.embed_tokens(token_ids) * self.scale
        far = self.rotary_emb(ctx.positions, x.dtype)
        near = self.local_rotary_emb(ctx.positions, x.dtype)
        own = self._own_inputs(token_ids, x)  # L times [T, I] or None
        for layer, window, own_input in zip(self.layers, self.windows, own, strict=True):
            x = layer(x, near if window else far, ctx, own_input)
        return self.norm(x)

    def _own_inputs(self, token_ids: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        """What each layer is told about the tokens: half from a table, half from embeddings."""
        if not self.own_width:
            return [None] * len(self.layers)
        shape = (len(x), len(self.layers), self.own_width)
        looked_up = (self.embed_tokens_per_layer(token_ids) * self.own_scale).view(shape)
        projected = (self.per_layer_model_projection(x) * x.shape[-1] ** -0.5).view(shape)
        both = (self.per_layer_projection_norm(projected) + looked_up) * 2**-0.5  # [T, L, I]
        return both.unbind(1)


class Gemma4ForCausalLM(GemmaForCausalLM):
    """Gemma 4 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, Gemma4Block, Gemma4Stack)

    @classmethod
    def kv_layers(cls, config: ModelConfig) -> Sequence[LayerKV]:
        """Two shapes; the last layers may read the KV of the last ones before them."""
        return layer_kv(config)

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one; no projections of keys and values that nobody reads."""
        for text in super().split(saved, config):
            found = _UNREAD.fullmatch(text.name)
            if found and layer_kv(config)[int(found[1])].shared_with is not None:
                continue
            yield from unstack(text)
