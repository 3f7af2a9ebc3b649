"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.kernels.gelu_mul import gelu_mul
from vllm_models.kernels.silu_mul import silu_mul

ACTIVATIONS = {"silu": silu_mul, "gelu_pytorch_tanh": gelu_mul}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Args:
        c: Shape of the model.
        width: Of the layer between; the model's own if absent.
        fused: Gate and up are one tensor of the checkpoint.
    """

    def __init__(self, c: ModelConfig, width: int | None = None, *, fused: bool = False) -> None:
        super().__init__()
        width = width or c.intermediate_size
        parts = {"gate_proj": width, "up_proj": width}
        self.activate = ACTIVATIONS[c.activation]
        self.gate_up_proj = Linear(c.hidden_size, 2 * width if fused else parts, bias=c.mlp_bias)
        self.down_proj = Linear(width, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[T, M] -> [T, M]."""
        return self.down_proj(self.activate(self.gate_up_proj(x)))
