"""Rotate queries and keys, each head after a norm if there is one, and store keys and values.

q [T, H, D], k [T, K, D], v [T, K, W] -> rotated queries [T, H, D]; angles as in `rope`, KV as in
`kv_write`. Results are those of the operators one after the other.
"""

from __future__ import annotations

from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.kernels import kv_write as written
from vllm_models.kernels import rms_norm as normed
from vllm_models.kernels import rope as turned
from vllm_models.kernels.kv_side import KVSide
from vllm_models.kernels.kv_write import kv_write
from vllm_models.kernels.rms_norm import Norm
from vllm_models.kernels.rope import rope

Angles = tuple[Tensor, Tensor, bool]  # cosine and signed sine [T, 1, R], and whether interleaved
Norms = tuple[Norm | None, Norm | None]  # of query heads and of key heads


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles,
    norms: Norms,
    keys: KVSide,
    values: KVSide,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate queries and keys, write every token's key and value in place; returns queries."""
    if (gpu := kernels_for(q)) is not None:
        return gpu.rope_write(q, k, v, angles, norms, keys, values, slot_mapping)
    q, k = rope(q, *angles, norms[0]), rope(k, *angles, norms[1])
    kv_write(k, v, keys, values, slot_mapping)
    return q


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles: Angles,
    norms: Norms,
    keys: KVSide,
    values: KVSide,
    slot_mapping: Tensor,
) -> Tensor:
    """The textbook forms, one after the other."""
    q, k = (
        turned.reference(x if norm is None else normed.reference(x, *norm), *angles)
        for x, norm in zip((q, k), norms, strict=True)
    )
    written.reference(k, v, keys, values, slot_mapping)
    return q
