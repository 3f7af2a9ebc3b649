"""Attention over one narrow latent vector per position, from which keys and values are made.

Only the latent and a part of the keys that rotates are kept. Queries are turned into the latent's
space and answers back from it, so that the cache is read as one key head, whose values are the
latents in its keys.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vllm_models.components.context import ForwardContext, LayerKV
from vllm_models.components.linear import Dense, Linear, LinearMethod, Place
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation, yarn_growth
from vllm_models.config import ModelConfig
from vllm_models.gpu.launch import kernels_for
from vllm_models.kernels.kv_write import kv_write
from vllm_models.kernels.paged_attention import paged_attention

_EPS = 1e-6  # of the norms inside, whatever the config says


class AsNumbers(LinearMethod):
    """Reads what another method reads, and keeps plain numbers."""

    def __init__(self, saved: LinearMethod) -> None:
        self._saved = saved
        self._dtype = torch.get_default_dtype()

    def create(self, layer: Linear) -> None:
        """As saved."""
        self._saved.create(layer)

    def places(self, layer: Linear, part: str) -> Mapping[str, Place]:
        """As saved."""
        return self._saved.places(layer, part)

    def pack(self, layer: Linear) -> None:
        """Drop everything but the numbers."""
        self._saved.pack(layer)
        weight = self._saved.dequantize(layer).to(self._dtype)
        Linear.use(layer, Dense())
        layer.packed = None
        layer.weight = nn.Parameter(weight, requires_grad=False)

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        """[T, in_features] -> [T, out_features]."""
        return self._saved.apply(layer, x, bias)

    def dequantize(self, layer: Linear) -> Tensor:
        """[out_features, in_features] float32."""
        return self._saved.dequantize(layer)


class PerHead(Linear):
    """Makes keys and values of all heads from latents; used in both directions, head by head."""

    def __init__(self, rank: int, num_heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__(rank, num_heads * (key_dim + value_dim))
        self.dims = (key_dim, value_dim)
        self.use(Dense())

    def use(self, method: LinearMethod) -> None:
        """Hold the weight as numbers, before anything was loaded."""
        super().use(AsNumbers(method))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Of keys [H, key width, rank] and of values [H, value width, rank]."""
        keys, values = self.weight.view(-1, sum(self.dims), self.in_features).split(self.dims, 1)
        return keys, values


class LatentAttention(nn.Module):
    """Attention of DeepSeek.

    Args:
        c: Shape of the model.
        layer: Whose KV is read and written.
    """

    def __init__(self, c: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        need = c.fields.positive
        self.rank, rotated = need("kv_lora_rank"), need("qk_rope_head_dim")
        key_dim, value_dim = need("qk_nope_head_dim"), need("v_head_dim")
        self.dims = (key_dim, rotated)
        self.scale = (key_dim + rotated) ** -0.5
        if c.rope.mscale_all_dim:
            self.scale *= yarn_growth(c.rope.factor, c.rope.mscale_all_dim) ** 2
        width, bias = c.num_heads * (key_dim + rotated), c.attention_bias
        rank = c.fields.get("q_lora_rank", int, 0)
        self.q_proj = None if rank else Linear(c.hidden_size, width)
        self.q_a_proj = Linear(c.hidden_size, rank, bias=bias) if rank else None
        self.q_a_layernorm = RMSNorm(rank, _EPS) if rank else None
        self.q_b_proj = Linear(rank, width) if rank else None
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, self.rank + rotated, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank, _EPS)
        self.kv_b_proj = PerHead(self.rank, c.num_heads, key_dim, value_dim)
        self.o_proj = Linear(c.num_heads * value_dim, c.hidden_size, bias=bias)

    @staticmethod
    def layer_kv(c: ModelConfig) -> LayerKV:
        """What a layer keeps."""
        width = c.fields.positive("kv_lora_rank") + c.fields.positive("qk_rope_head_dim")
        return LayerKV(0, 1, width, 0)

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        keys_up, values_up = self.kv_b_proj.matrices()
        q, q_rotated = self._queries(x).split(self.dims, dim=-1)  # [T, H, D], [T, H, R]
        latent, k_rotated = self.kv_a_proj_with_mqa(x).split((self.rank, self.dims[1]), dim=-1)
        key = torch.cat((self.kv_a_layernorm(latent)[:, None], rotate(k_rotated[:, None])), -1)
        keys, values = ctx.kv[self.layer]
        kv_write(key, None, keys, values, ctx.slot_mapping)
        absorbed = torch.bmm(q.transpose(0, 1), keys_up).transpose(0, 1)  # [T, H, rank]
        q = torch.cat((absorbed, rotate(q_rotated)), dim=-1)
        if kernels_for(x) is not None:  # torch wants values as wide as keys
            values = values._replace(data=values.data[..., : self.rank])
        out = paged_attention(q, keys, values, ctx.attention[self.layer], self.scale)
        out = torch.bmm(out[..., : self.rank].transpose(0, 1), values_up.transpose(1, 2))
        return self.o_proj(out.transpose(0, 1).flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, H, D + R]."""
        if self.q_a_proj is not None and self.q_a_layernorm is not None:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        return q.view(len(x), -1, sum(self.dims))
