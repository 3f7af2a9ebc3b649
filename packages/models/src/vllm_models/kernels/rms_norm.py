"""Root-mean-square normalisation over the last dimension, alone or of a sum:

    y = x / sqrt(mean(x^2) + eps) * (weight + offset)

x [..., M], weight [M] or none. Sums are in float32 whatever the element type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.native import pointwise
from vllm_models.native.library import library_for


class Norm(NamedTuple):
    """A norm of something that another operator reads."""

    weight: Tensor  # [M]
    eps: float
    offset: float = 0.0


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Normalise the last dimension."""
    if (gpu := kernels_for(x)) is not None:
        return gpu.rms_norm(x, weight, eps, offset)
    if offset and weight is not None:  # the sum may be no number of the weight's type
        return rms_norm(x.float(), weight.float() + offset, eps).to(x.dtype)
    library = library_for(x)
    if library is not None and (weight is None or weight.dtype == x.dtype):
        return pointwise.rms_norm(library, x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """residual + x, rounded to its type, and the norm of that: both [T, M]."""
    if (gpu := kernels_for(x)) is not None:
        return gpu.add_rms_norm(x, residual, weight, eps, offset)
    total = residual + x
    return total, rms_norm(total, weight, eps, offset)


def reference(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """The textbook form."""
    wide = x.float()
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (normed if weight is None else normed * (weight.float() + offset)).to(x.dtype)
