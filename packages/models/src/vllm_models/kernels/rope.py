"""Rotary position embedding: rotate pairs of numbers of a head by its position's angle.

x [T, H, D]; cos and sin [T, 1, R]; the first R numbers of a head turn. Pairs are
(x[i], x[i + R/2]), or interleaved (x[2i], x[2i + 1]). sin is negated where the first of a pair
stands, so that y = x * cos + exchange_pairs(x) * sin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.kernels.rms_norm import Norm, rms_norm
from vllm_models.native.library import library_for
from vllm_models.native.pointwise import rotate_heads


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, norm: Norm | None = None
) -> Tensor:
    """Rotate all heads of all tokens, each after an RMSNorm if one is given."""
    if (gpu := kernels_for(x)) is not None:
        return gpu.rope(x, cos, sin, interleaved, norm)
    if norm is not None and norm.offset:
        x, norm = rms_norm(x, *norm), None
    library = library_for(x)
    if library is not None and x.stride()[1:] == (x.shape[2], 1):
        with_norm = norm if norm is None else (norm.weight, norm.eps)
        return rotate_heads(library, x, (cos, sin), interleaved, with_norm)
    if norm is not None:
        x = rms_norm(x, *norm)
    width = cos.shape[-1]
    turned = x[..., :width]
    if interleaved:
        exchanged = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        exchanged = turned.roll(width // 2, dims=-1)
    out = torch.addcmul(turned * cos, exchanged, sin)
    return out if width == x.shape[-1] else torch.cat((out, x[..., width:]), dim=-1)


def reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The textbook form, pair by pair."""
    out, width = x.float().clone(), cos.shape[-1]
    for pair in range(width // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        cosine, sine = cos[..., first].float(), sin[..., second].float()
        a, b = x[..., first].float(), x[..., second].float()
        out[..., first] = a * cosine - b * sine
        out[..., second] = b * cosine + a * sine
    return out.to(x.dtype)
