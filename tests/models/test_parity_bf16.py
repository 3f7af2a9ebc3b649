"""Every architecture in bfloat16 against transformers in bfloat16.

Both round after almost every operation, in different order, so logits differ. How much rounding
moves the logits of a position is measured: the largest difference between transformers in bfloat16
and in float32 there, or half way up the list of all positions if that is more. Each side may be
off by as much in each of two logits, so where the best token leads by more than four times as much,
it must be the same. Tokens use all experts, because a choice between two that are nearly equal is
no rounding any more.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_traits import Request, SamplingParams

EXPERTS = {"num_experts_per_tok": 4, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 20,
        "q_lora_rank": 28,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    }
    | EXPERTS,
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3": {"sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma4": {"sliding_window": 6, "global_head_dim": 32, "hidden_size_per_layer_input": 0},
    "glm4": {},
    "glm4_moe": {"n_routed_experts": 4} | EXPERTS,
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 4},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 4},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "phi3": {"head_dim": 12},
    "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 40} | EXPERTS,
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4} | EXPERTS,
}
WEIGHTS = {"initializer_range": 0.1}  # small enough that layers do not amplify rounding
NUM_PROMPT = 61


@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_token_is_the_same_wherever_it_leads_by_more_than_rounding(
    family: str, make_checkpoint: Any
) -> None:
    checkpoint = make_checkpoint(family, saved_as=torch.bfloat16, **(WEIGHTS | FAMILIES[family]))
    prompt = tuple(random.Random(5).choices(range(3, 128), k=NUM_PROMPT))
    precise = checkpoint.logits(prompt)
    checkpoint.model.to(torch.bfloat16)
    logits = checkpoint.logits(prompt)
    rounding = (logits - precise).abs().amax(-1)  # [T]
    rounding = rounding.clamp(min=rounding.median())
    leads = logits.topk(2).values.diff().abs().squeeze(-1)  # [T]

    engine = Engine(checkpoint.load(dtype="bf16", block_size=16), SchedulerConfig())
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, logprobs=1)
    engine.add(Request("it", prompt, params))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    scored = sum((o.prompt_logprobs for o in outputs), ())[1:]
    best = [entry.top[0][0] for entry in (*scored, *outputs[-1].logprobs)]
    clear = leads > 4 * rounding
    assert len(best) == NUM_PROMPT
    assert clear.float().mean() > 0.4, "the test wants positions that it can judge"
    assert torch.equal(torch.tensor(best)[clear], logits.argmax(-1)[clear])
