"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.kernels.silu_mul import silu_mul


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        c: Shape of the model.
        width: Of the layer between; the model's own if absent.
    """

    def __init__(self, c: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = width or c.intermediate_size
        parts = {"gate_proj": width, "up_proj": width}
        self.gate_up_proj = Linear(c.hidden_size, parts, bias=c.mlp_bias)
        self.down_proj = Linear(width, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.down_proj(silu_mul(self.gate_up_proj(x)))
