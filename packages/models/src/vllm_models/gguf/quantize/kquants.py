"""Blocks of 256 weights: sub-blocks with small integer scales, which share a half-float scale.

Codes are made last, with the scales as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.gguf.quantize.fit import (
    Affine,
    affine_codes,
    extreme,
    fit_affine,
    fit_symmetric,
    inverse_of,
    refit_scale,
    symmetric_codes,
)
from vllm_models.gguf.quantize.halves import half_bytes, to_half


def _columns(blocks: Tensor, size: int) -> Tensor:
    """[n, 256] -> [size, n * 256 / size], a sub-block a column."""
    return blocks.view(-1, size).t().contiguous()


def _affine_scales(
    x: Tensor, fit: Affine, largest: int, per_block: int
) -> tuple[Tensor, Tensor, Affine]:
    """Scales as they are stored, and what they stand for.

    Offsets are rounded first, and scales fitted again to what these became.

    Args:
        x: [G, N] that was fitted.
        fit: Of every sub-block.
        largest: Code of a weight.
        per_block: How many sub-blocks share their scale; integers have 6 bits, 4 if they are 16.

    Returns:
        Half floats of scales and offsets [2, n], integers uint8 [2, n, per_block], and the fit
        that these are, [N].
    """
    limit = 63 if per_block == 8 else 15
    shared_offset, offset_levels, offset = _shared(fit.offset, per_block, limit)
    scale = refit_scale(x, Affine(fit.scale, offset), largest)
    shared_scale, scale_levels, scale = _shared(scale, per_block, limit)
    shared = torch.stack([shared_scale, shared_offset])
    return shared, torch.stack([scale_levels, offset_levels]), Affine(scale, offset)


def _shared(values: Tensor, per_block: int, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half floats [n], integers uint8 [n, per_block], and the values that these are, [N]."""
    wanted = values.view(-1, per_block)
    shared = to_half(wanted.amax(1) / largest)
    inverse = inverse_of(shared.float())[:, None]
    levels = (wanted * inverse).round_().clamp_(0, largest)
    return shared, levels.to(torch.uint8), (levels * shared.float()[:, None]).view(-1)


def _scales_6bit(levels: Tensor) -> Tensor:
    """[2, n, 8] scales and offsets of 6 bits -> [n, 12] as Q4_K and Q5_K hold them."""
    scales, offsets = levels
    low = levels[:, :, :4] | (levels[:, :, 4:] >> 4 << 6)
    return torch.cat([low[0], low[1], (scales[:, 4:] & 15) | (offsets[:, 4:] << 4)], 1)


def _split(codes: Tensor, size: int) -> Tensor:
    """[size, n * 256 / size] float -> [n, 256] uint8."""
    return codes.to(torch.uint8).t().contiguous().view(-1, 256)


def q4_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 -> [n, 144]."""
    x = _columns(blocks, 32)
    shared, levels, fit = _affine_scales(x, fit_affine(x, 15, (0.0, 0.8), 1), 15, 8)
    codes = _split(affine_codes(x, fit, 15), 32).view(-1, 4, 2, 32)
    packed = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    return torch.cat(
        [half_bytes(shared[0]), half_bytes(shared[1]), _scales_6bit(levels), packed], 1
    )


def q5_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 -> [n, 176]."""
    x = _columns(blocks, 32)
    shared, levels, fit = _affine_scales(x, fit_affine(x, 31, (0.0, 0.8), 1), 31, 8)
    codes = _split(affine_codes(x, fit, 31), 32).view(-1, 8, 32)
    low, high = codes & 15, codes >> 4
    packed = (low[:, 0::2] | low[:, 1::2] << 4).flatten(1)
    top = _join(high, 1)
    scales = _scales_6bit(levels)
    return torch.cat([half_bytes(shared[0]), half_bytes(shared[1]), scales, top, packed], 1)


def _join(codes: Tensor, bits: int) -> Tensor:
    """[n, count, width] of few bits -> [n, width], the first in the lowest bits."""
    joined = codes[:, 0]
    for index in range(1, codes.shape[1]):
        joined = joined | codes[:, index] << bits * index
    return joined


def q2_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 -> [n, 84]."""
    x = _columns(blocks, 16)
    shared, levels, fit = _affine_scales(x, fit_affine(x, 3, (0.0, 0.7), 2), 3, 16)
    codes = _split(affine_codes(x, fit, 3), 16).view(-1, 4, 32)
    packed = torch.cat([_join(codes.view(-1, 2, 4, 32)[:, half], 2) for half in (0, 1)], 1)
    scales = levels[0] | levels[1] << 4
    return torch.cat([scales, packed, half_bytes(shared[0]), half_bytes(shared[1])], 1)


def _symmetric_scales(scales: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half floats [n], integers [n, 16] float32 from -levels, and the scales that these are."""
    wanted = scales.view(-1, 16)
    shared = to_half(extreme(wanted.t()) / -levels)
    inverse = inverse_of(shared.float())[:, None]
    stored = (wanted * inverse).round_().clamp_(-levels, levels - 1)
    return shared, stored, (stored * shared.float()[:, None]).view(-1)


def q3_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 -> [n, 110]."""
    x = _columns(blocks, 16)
    shared, levels, fit = _symmetric_scales(fit_symmetric(x, 4, (0.0, -1.0), 2), 32)
    codes = _split(symmetric_codes(x, fit, 4).add_(4), 16)
    top = _join((codes >> 2).view(-1, 8, 32), 1)
    low = (codes & 3).view(-1, 2, 4, 32)
    packed = torch.cat([_join(low[:, half], 2) for half in (0, 1)], 1)
    six = levels.add_(32).to(torch.uint8)
    scales = torch.cat(
        [(six[:, :8] & 15) | six[:, 8:] << 4, _join((six >> 4).view(-1, 4, 4), 2)], 1
    )
    return torch.cat([top, packed, scales, half_bytes(shared)], 1)


def q6_k(blocks: Tensor) -> Tensor:
    """[n, 256] float32 -> [n, 210]."""
    x = _columns(blocks, 16)
    shared, levels, fit = _symmetric_scales(fit_symmetric(x, 32, (0.0,), 2), 128)
    codes = _split(symmetric_codes(x, fit, 32).add_(32), 16).view(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    packed = (low[:, :, :2] | low[:, :, 2:] << 4).flatten(1)
    top = torch.cat([_join(high[:, half], 2) for half in (0, 1)], 1)
    return torch.cat([packed, top, levels.to(torch.int8).view(torch.uint8), half_bytes(shared)], 1)
