"""DeepSeek-V3 and R1: attention over latents, and experts in groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from vllm_models.architectures.glm4_moe import feed_forward, split_grouped
from vllm_models.components.context import ForwardContext, LayerKV
from vllm_models.components.decoder import CausalLM, DecoderStack, MakeBlock
from vllm_models.components.latent import LatentAttention
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import RotaryEmbedding, Rotation
from vllm_models.config import ModelConfig
from vllm_models.weights.saved import SavedTensor


class DeepseekV3Block(nn.Module):
    """One decoder layer."""

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = LatentAttention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = feed_forward(c, layer)

    def forward(
        self, x: Tensor, added: Tensor | None, rotate: Rotation, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """[T, M] and what is to be added to it -> the same for the next layer."""
        x, normed = self.input_layernorm.after(x, added)
        x, normed = self.post_attention_layernorm.after(x, self.self_attn(normed, rotate, ctx))
        return x, self.mlp(normed)


class DeepseekV3Stack(DecoderStack):
    """Layers of which only a part of each head rotates, whose width has a field of its own."""

    def __init__(self, c: ModelConfig, block: MakeBlock) -> None:
        super().__init__(c, block)
        self.rotary_emb = RotaryEmbedding(c.fields.positive("qk_rope_head_dim"), c.rope)


class DeepseekV3ForCausalLM(CausalLM):
    """DeepSeek-V3 with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, DeepseekV3Block, DeepseekV3Stack)

    @classmethod
    def kv_layers(cls, config: ModelConfig) -> Sequence[LayerKV]:
        """A latent in every layer."""
        return (LatentAttention.layer_kv(config),) * config.num_layers

    @classmethod
    def split(cls, saved: SavedTensor, config: ModelConfig) -> Iterable[SavedTensor]:
        """Experts one by one, without layers that draft."""
        return split_grouped(saved, config)
