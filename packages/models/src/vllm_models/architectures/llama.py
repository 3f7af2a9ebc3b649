"""Llama 1, 2 and 3: grouped attention with rotary positions, gated feed-forward, RMSNorm first."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.attention import Attention
from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import Decoder
from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.components.mlp import GatedMLP
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import RotaryEmbedding, Rotation
from vllm_models.config import ModelConfig


class LlamaBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = GatedMLP(c)

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        x = x + self.self_attn(self.input_layernorm(x), rotate, ctx)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Everything but the output head."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(LlamaBlock(c, layer) for layer in range(c.num_layers))
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.rotary_emb = RotaryEmbedding(c.head_dim, c.rope)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        x = self.embed_tokens(token_ids)
        rotate = self.rotary_emb(ctx.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotate, ctx)
        return self.norm(x)


class LlamaForCausalLM(Decoder):
    """Llama with its output head, which may be the embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size)

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """[T] -> [T, M]."""
        return self.model(token_ids, ctx)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, M] -> [N, V]."""
        if self.lm_head is None:
            return self.model.embed_tokens.logits(hidden)
        return self.lm_head(hidden)
