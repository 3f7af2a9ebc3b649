"""Angles of the rotary position embedding, and the scalings that stretch it to longer contexts.

A key stays in the KV cache with the angle that it got when it was computed, so a scaling does not
change with the length that a sequence has reached.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vllm_models.components.norm import RMSNorm
from vllm_models.config import RopeConfig
from vllm_models.kernels.angles import angles
from vllm_models.kernels.kv_side import KVSide
from vllm_models.kernels.rms_norm import Norm
from vllm_models.kernels.rope import rope
from vllm_models.kernels.rope_write import rope_write


class Rotation(NamedTuple):
    """Cosine and signed sine [T, 1, R] of a step's positions; R of the D numbers of a head turn."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """Rotate the heads of a step, each normalised before if so wanted: [T, H, D]."""
        return rope(x, *self, _terms(norm))

    def write(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        norms: tuple[RMSNorm | None, RMSNorm | None],
        kv: tuple[KVSide, KVSide],
        slot_mapping: Tensor,
    ) -> Tensor:
        """Rotate queries and keys, store keys and values, and give the queries [T, H, D].

        Args:
            qkv: [T, H, D], [T, K, D] and [T, K, W].
            norms: Of query heads and of key heads before.
            kv: Keys and values of a layer.
            slot_mapping: [T] where those of each token are written.
        """
        terms = (_terms(norms[0]), _terms(norms[1]))
        return rope_write(*qkv, self, terms, *kv, slot_mapping)


def _terms(norm: RMSNorm | None) -> Norm | None:
    return None if norm is None else norm.terms()


class RotaryEmbedding(nn.Module):
    """Turns positions into rotations, once per step for all layers."""

    inverse_wavelengths: Tensor

    def __init__(self, head_dim: int, config: RopeConfig) -> None:
        super().__init__()
        frequencies, self.amplitude = rope_frequencies(head_dim, config)
        self.interleaved = config.interleaved
        self.register_buffer("inverse_wavelengths", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """[T] -> rotations [T, 1, R]; the angles are in float32."""
        found = angles(positions, self.inverse_wavelengths, self.amplitude, dtype, self.interleaved)
        return Rotation(*found, self.interleaved)


def rope_frequencies(head_dim: int, c: RopeConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair that turns [R / 2], and the factor of cosine and sine."""
    width = head_dim if c.kind == "proportional" else int(head_dim * c.rotated)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    frequencies = 1.0 / c.theta**exponents
    match c.kind:
        case "proportional":
            still = torch.arange(width // 2, device="cpu") >= int(c.rotated * width // 2)
            return frequencies.masked_fill(still, 0.0) / c.factor, 1.0
        case "linear":
            return frequencies / c.factor, 1.0
        case "llama3":
            return _llama3(frequencies, c), 1.0
        case "yarn":
            return _yarn(frequencies, width, c), c.attention_factor or _yarn_amplitude(c)
        case "longrope":
            stretches = torch.tensor(c.stretches, dtype=torch.float32, device="cpu")
            return 1.0 / (stretches * c.theta**exponents), c.attention_factor or 1.0
    return frequencies, 1.0


def _llama3(frequencies: Tensor, c: RopeConfig) -> Tensor:
    """Stretch long wavelengths, keep short ones, and blend between the two limits."""
    turns = c.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies / c.factor * (1 - keep) + frequencies * keep


def _yarn(frequencies: Tensor, width: int, c: RopeConfig) -> Tensor:
    """The same idea with a ramp over dimensions instead of wavelengths."""

    def dimension(turns: float) -> float:
        wavelength = c.original_max_position / (turns * 2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(c.theta))

    low, high = dimension(c.beta_fast), dimension(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    stretch = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / c.factor * stretch + frequencies * (1 - stretch)


def _yarn_amplitude(c: RopeConfig) -> float:
    if c.mscale and c.mscale_all_dim:
        return yarn_growth(c.factor, c.mscale) / yarn_growth(c.factor, c.mscale_all_dim)
    return yarn_growth(c.factor, 1.0)


def yarn_growth(factor: float, weight: float) -> float:
    """By how much yarn sharpens attention that looks over a longer context."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
