"""Self-attention with grouped heads over the paged KV of one layer."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.context import ForwardContext
from vllm_models.components.linear import Linear
from vllm_models.components.norm import RMSNorm
from vllm_models.components.rotary import Rotation
from vllm_models.config import ModelConfig
from vllm_models.kernels.paged_attention import paged_attention


class Attention(nn.Module):
    """Project, rotate, remember, attend, project back.

    Args:
        c: Shape of the model.
        layer: Whose KV is read and written.
        qk_norm: Normalise each query and key head before the rotation.
        qkv_bias: Queries, keys and values have biases whatever the config says.
        out_bias: The last projection may have a bias; if it has one, the config says.
        fused: Queries, keys and values are one tensor of the checkpoint.
    """

    def __init__(
        self,
        c: ModelConfig,
        layer: int,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        out_bias: bool = True,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        self.head_dim = c.head_dim
        self.scale = c.head_dim**-0.5
        names = ("q_proj", "k_proj", "v_proj")
        parts = {name: n * c.head_dim for name, n in zip(names, self.heads, strict=True)}
        self.qkv_proj = Linear(
            c.hidden_size,
            sum(parts.values()) if fused else parts,
            bias=c.attention_bias or qkv_bias,
        )
        out_bias = out_bias and c.attention_bias
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if qk_norm else None
        self.head_norms = (self.q_norm, self.k_norm)

    def forward(self, x: Tensor, rotate: Rotation, ctx: ForwardContext) -> Tensor:
        """[T, M] -> [T, M]."""
        kv = ctx.kv[self.layer]
        q = rotate.write(self.project(x), self.head_norms, kv, ctx.slot_mapping)  # [T, H, D]
        out = paged_attention(q, *kv, ctx.attention[self.layer], self.scale)  # [T, H, D]
        return self.o_proj(out.flatten(1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, M] -> queries [T, H, D], keys and values [T, K, D], before heads are normalised."""
        qkv = self.qkv_proj(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, D]
        return qkv.split(self.heads, dim=1)
