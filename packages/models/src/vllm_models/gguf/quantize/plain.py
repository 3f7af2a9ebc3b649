"""Blocks of 32 weights with a half-float scale, some with an offset."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.gguf.quantize.fit import Affine, affine_codes, extreme, inverse_of
from vllm_models.gguf.quantize.halves import half_bytes, to_half


def _columns(blocks: Tensor) -> Tensor:
    return blocks.t().contiguous()


def _nibbles(codes: Tensor) -> Tensor:
    """[n, 32] uint8 -> [n, 16], the second half of the block in the upper bits."""
    return codes[:, :16] & 15 | codes[:, 16:] << 4


def _fifth_bits(codes: Tensor) -> Tensor:
    """[n, 32] uint8 -> [n, 4], bit i of the 32 is the fifth of code i."""
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).view(-1, 4, 8) << bits).sum(2, dtype=torch.uint8)


def q8_0(blocks: Tensor) -> Tensor:
    """[n, 32] float32 -> [n, 34]."""
    scale = blocks.abs().amax(1) / 127
    codes = (blocks * inverse_of(scale)[:, None]).round_().to(torch.int8)
    return torch.cat([half_bytes(to_half(scale)), codes.view(torch.uint8)], 1)


def q4_0(blocks: Tensor) -> Tensor:
    """[n, 32] float32 -> [n, 18]."""
    scale, codes = _symmetric(blocks, 8)
    return torch.cat([scale, _nibbles(codes)], 1)


def q5_0(blocks: Tensor) -> Tensor:
    """[n, 32] float32 -> [n, 22]."""
    scale, codes = _symmetric(blocks, 16)
    return torch.cat([scale, _fifth_bits(codes), _nibbles(codes)], 1)


def q4_1(blocks: Tensor) -> Tensor:
    """[n, 32] float32 -> [n, 20]."""
    scales, codes = _affine(blocks, 15)
    return torch.cat([scales, _nibbles(codes)], 1)


def q5_1(blocks: Tensor) -> Tensor:
    """[n, 32] float32 -> [n, 24]."""
    scales, codes = _affine(blocks, 31)
    return torch.cat([scales, _fifth_bits(codes), _nibbles(codes)], 1)


def _symmetric(blocks: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The weight farthest from 0 gets the lowest code, 0."""
    x = _columns(blocks)
    scale = extreme(x) / -levels
    codes = (x * inverse_of(scale)).round_().add_(levels).clamp_(0, 2 * levels - 1)
    return half_bytes(to_half(scale)), codes.to(torch.uint8).t().contiguous()


def _affine(blocks: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes spread from the smallest weight to the largest."""
    x = _columns(blocks)
    low, high = x.amin(0), x.amax(0)
    scale = (high - low) / largest
    codes = affine_codes(x, Affine(scale, -low), largest).to(torch.uint8).t().contiguous()
    return torch.cat([half_bytes(to_half(scale)), half_bytes(to_half(low))], 1), codes
