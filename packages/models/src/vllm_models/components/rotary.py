"""Angles of the rotary position embedding, and the scalings that stretch it to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vllm_models.config import RopeConfig
from vllm_models.kernels.rope import rope


class Rotation(tuple[Tensor, Tensor]):
    """Cosine and signed sine [T, 1, D] of a step's positions."""

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the heads of a step: [T, H, D] -> [T, H, D]."""
        cos, sin = self
        return rope(x, cos, sin)


class RotaryEmbedding(nn.Module):
    """Turns positions into rotations, once per step for all layers."""

    inverse_wavelengths: Tensor

    def __init__(self, head_dim: int, config: RopeConfig) -> None:
        super().__init__()
        frequencies, self.amplitude = rope_frequencies(head_dim, config)
        self.register_buffer("inverse_wavelengths", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """[T] -> rotations [T, 1, D]; the angles are in float32."""
        angles = positions[:, None, None].float() * self.inverse_wavelengths  # [T, 1, D/2]
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        return Rotation((torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)))


def rope_frequencies(head_dim: int, c: RopeConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair [head_dim / 2], and the factor of cosine and sine."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / c.theta**exponents
    match c.kind:
        case "linear":
            return frequencies / c.factor, 1.0
        case "llama3":
            return _llama3(frequencies, c), 1.0
        case "yarn":
            default = 0.1 * math.log(c.factor) + 1.0 if c.factor > 1 else 1.0
            return _yarn(frequencies, head_dim, c), c.attention_factor or default
    return frequencies, 1.0


def _llama3(frequencies: Tensor, c: RopeConfig) -> Tensor:
    """Stretch long wavelengths, keep short ones, and blend between the two limits."""
    turns = c.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies / c.factor * (1 - keep) + frequencies * keep


def _yarn(frequencies: Tensor, head_dim: int, c: RopeConfig) -> Tensor:
    """The same idea with a ramp over dimensions instead of wavelengths."""

    def dimension(turns: float) -> float:
        wavelength = c.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    stretch = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / c.factor * stretch + frequencies * (1 - stretch)
