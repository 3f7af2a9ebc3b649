"""Causal attention of a ragged batch over KV blocks: by chunks where a sequence has few queries,
by tiles of queries where it has many, and both where sequences of both kinds are in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.gpu.kv_write import heads_together
from vllm_models.gpu.paged_chunks import plan, queries_for
from vllm_models.gpu.paged_decode import decode
from vllm_models.gpu.paged_prefill import prefill
from vllm_models.gpu.paged_tile import Scoring
from vllm_models.gpu.spans import GpuSpans


def paged_attention(
    q: Tensor,
    key_data: Tensor,
    key_scales: Tensor | None,
    value_data: Tensor,
    value_scales: Tensor | None,
    spans: GpuSpans,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from every query of the step to the blocks of its sequence: [T, H, W].

    Args:
        q: [T, H, D]; tokens may be apart.
        key_data: [B, K, P, D] of any type; with scales if it has eight bits.
        key_scales: float32 [B, K, P].
        value_data: [B, K, P, W], or the first W columns of the keys themselves.
        value_scales: float32 [B, K, P].
        spans: Who attends to what.
        scale: Multiplies the scores.
        soft_cap: Scores s become cap * tanh(s / cap); 0 leaves them.
        sinks: [H] a score of nothing, beside those of the keys.
    """
    q, scoring = heads_together(q), Scoring(scale, soft_cap, sinks)
    num_heads, num_kv_heads = q.shape[1], key_data.shape[1]
    out = torch.empty((*q.shape[:2], value_data.shape[3]), dtype=q.dtype, device=q.device)
    keys, values = (key_data, key_scales), (value_data, value_scales)
    few = queries_for(spans.max_queries, num_heads // num_kv_heads)
    if spans.min_queries <= few:
        chunks = spans.chunks or plan(spans, num_heads, num_kv_heads)
        decode(out, q, keys, values, spans, chunks, scoring)
    if spans.max_queries > few:
        prefill(out, q, keys, values, spans, scoring, few)
    return out
