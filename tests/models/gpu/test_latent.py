"""Attention over latents as its kernels see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_models.gpu import kernels
from vllm_models.gpu.paged_shapes import Sizes, sizes
from vllm_traits import Batch, Chunk, SamplingParams, Start

RANK, ROTATED, HEADS = 16, 8, 4


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """What every call of the kernels is about."""
    found: list[Sizes] = []
    attend = kernels.paged_attention

    def spy(q: Tensor, keys: Tensor, key_scales: None, values: Tensor, *others: Any) -> Tensor:
        found.append(sizes(keys, values, q.shape[1], has_window=False, has_cap=False))
        return attend(q, keys, key_scales, values, *others)

    monkeypatch.setattr(kernels, "paged_attention", spy)
    return found


def test_latents_are_read_once_and_values_leave_out_what_rotates(
    make_checkpoint: Callable[..., Any], triton_path: None, seen: list[Sizes]
) -> None:
    checkpoint = make_checkpoint(
        "deepseek_v3",
        num_hidden_layers=1,
        first_k_dense_replace=1,
        kv_lora_rank=RANK,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=ROTATED,
        v_head_dim=8,
        head_dim=ROTATED,
        num_key_value_heads=HEADS,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = checkpoint.load(block_size=16, enforce_eager=True, device=device)
    start = Start(0, (5, 17, 99), SamplingParams(temperature=0.0), num_prompt_tokens=3)
    token = backend.forward(Batch((Chunk(0, 0, 3, (0,)),), (start,))).result().token_ids[0]
    assert token == checkpoint.greedy((5, 17, 99), 1)
    assert seen
    for known in seen:
        assert known.is_read_once
        assert (known.keys.width, known.keys.rest) == (RANK + ROTATED, 16)
        assert (known.values.width, known.values.rest) == (RANK, 0)
