"""Root-mean-square normalisation: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

x [..., M], weight [M]. Sums are in float32 whatever the element type.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vllm_models.native import pointwise
from vllm_models.native.library import library_for


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension."""
    library = library_for(x)
    if library is not None and weight.dtype == x.dtype:
        return pointwise.rms_norm(library, x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The textbook form."""
    wide = x.float()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()).to(x.dtype)
