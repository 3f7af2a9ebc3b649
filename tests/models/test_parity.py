"""Every architecture and variant against HF transformers, in every way a prompt can be computed.

Runs through `vllm_core.Engine`, so that chunks, cache hits and preemptions are the real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_traits import Request, RequestOutput, SamplingParams, TokenLogprobs

TOLERANCE = 1e-3
NUM_TOKENS = 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def old_rope_fields(fields: dict[str, Any]) -> None:
    """The spelling of checkpoints saved before `rope_parameters`."""
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["torch_dtype"] = fields.pop("dtype")
    if rope.pop("rope_type") != "default":
        fields["rope_scaling"] = rope | {"type": "llama3", "rope_type": "llama3"}


def rope(theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VOCAB_SIZE = 128
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-multi-head": {"num_key_value_heads": 4},
    "llama-one-kv-head-tied": {
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,
    },
    "llama-wide-heads-odd-layers": {"head_dim": 24, "num_hidden_layers": 3},
    "llama-attention-bias": {"attention_bias": True},
    "llama-both-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-sharded": {"num_hidden_layers": 3, "shard_size": "40KB"},
    "llama-saved-in-bf16": {"saved_as": torch.bfloat16},
    "llama-saved-in-f16": {"saved_as": torch.float16},
    "llama-old-rope-fields": rope(500.0) | {"rewrite": old_rope_fields},
    "llama3-scaling": rope(500.0, **LLAMA3),
    "llama3-scaling-old-fields": rope(500.0, **LLAMA3) | {"rewrite": old_rope_fields},
    "llama-linear-scaling": rope(rope_type="linear", factor=2.0),
    "llama-yarn-scaling": rope(500.0, **YARN),
    "llama-padded-vocabulary-several-eos": {"vocab_size": 160, "eos_token_id": [2, 5, 7]},
    "mistral-no-window": {"family": "mistral", "sliding_window": None},
    "mistral-window-shorter-than-the-prompt": {"family": "mistral", "sliding_window": 6},
    "mistral-wide-heads-window-of-blocks": {
        "family": "mistral",
        "sliding_window": 16,
        "head_dim": 24,
        "num_hidden_layers": 3,
    },
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "mixtral-one-of-three-experts-window": {
        "family": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
        "sliding_window": 7,
    },
    "qwen2-moe": {"family": "qwen2_moe", "shared_expert_intermediate_size": 40} | EXPERTS,
    "qwen2-moe-every-second-layer-renormalised": {
        "family": "qwen2_moe",
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
    }
    | EXPERTS,
    "qwen3-moe": {"family": "qwen3_moe", "norm_topk_prob": True} | EXPERTS,
    "qwen3-moe-dense-first-layer": {
        "family": "qwen3_moe",
        "mlp_only_layers": [0],
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "initializer_range": 0.4,
    }
    | EXPERTS,
    "qwen2": {"family": "qwen2"},
    "qwen2-tied-odd-layers-old-rope-fields": {
        "family": "qwen2",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "initializer_range": 0.4,
        "rewrite": old_rope_fields,
    },
    "qwen3": {"family": "qwen3"},
    "qwen3-tied-one-kv-head": {
        "family": "qwen3",
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "initializer_range": 0.4,
    },
    "qwen3-wide-heads-odd-layers": {"family": "qwen3", "head_dim": 32, "num_hidden_layers": 3},
    "qwen3-bias-sharded-bf16": {
        "family": "qwen3",
        "attention_bias": True,
        "saved_as": torch.bfloat16,
        "shard_size": "40KB",
    },
}


@dataclass
class Way:
    """How the request is run: options of the backend and the engine, and what else runs."""

    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    num_strangers: int = 0
    twice: bool = False
    drafts: bool = False


WAYS = {
    "one-shot": Way(),
    "chunked": Way(config={"max_batch_tokens": 8}),
    "token-by-token": Way({"block_size": 1, "num_blocks": 256}, {"max_batch_tokens": 1}),
    "with-strangers": Way(num_strangers=5),
    "after-a-prefix-hit": Way(twice=True),
    "after-a-preemption": Way(
        {"num_blocks": 40}, {"prefix_cache": False, "watermark": 0.0}, num_strangers=5
    ),
    "drafted": Way(drafts=True),
}


@dataclass
class Expected:
    checkpoint: Any
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    logprobs: torch.Tensor  # [positions, V] of prompt and completion


@pytest.fixture(scope="module", params=VARIANTS)
def expected(request: pytest.FixtureRequest, make_checkpoint: Any) -> Expected:
    checkpoint = make_checkpoint(**VARIANTS[request.param])
    prompt = tuple(random.Random(7).choices(range(3, VOCAB_SIZE), k=29))
    completion = checkpoint.greedy(prompt, NUM_TOKENS)
    logits = checkpoint.logits(prompt + completion)
    assert 5 < logits.abs().max() < 100, "the test wants logits of the order of 10"
    return Expected(checkpoint, prompt, completion, logits.log_softmax(-1))


def run(engine: Engine, requests: list[Request]) -> dict[str, list[RequestOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
    for _ in range(5000):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            assert output.error is None, output
            outputs[output.request_id].append(output)
    raise AssertionError("the engine does not finish")


def often_right(expected: Expected) -> Callable[[Sequence[int]], Sequence[int]]:
    """Drafts that are the true completion, except that every fifth token is wrong."""
    tokens = [t if i % 5 else t ^ 1 for i, t in enumerate(expected.prompt + expected.completion)]
    return lambda known: tokens[len(known) : len(known) + 3]


def stranger(number: int) -> Request:
    rng = random.Random(number)
    prompt = tuple(rng.choices(range(3, VOCAB_SIZE), k=rng.randint(5, 40)))
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.8]), top_k=5, seed=number, max_tokens=40, ignore_eos=True
    )
    return Request(f"stranger-{number}", prompt, params)


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_and_greedy_tokens_equal_transformers(expected: Expected, way: str) -> None:
    chosen = WAYS[way]
    vocab_size = expected.logprobs.shape[1]
    scores_prompt = not chosen.twice
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=vocab_size,
        prompt_logprobs=vocab_size if scores_prompt else None,
    )
    engine = Engine(
        expected.checkpoint.load(**chosen.options),
        SchedulerConfig(**chosen.config),
        propose=(lambda: often_right(expected)) if chosen.drafts else None,
    )
    strangers = [stranger(number) for number in range(chosen.num_strangers)]
    if chosen.twice:
        run(engine, [Request("before", expected.prompt, params)])
    outputs = run(engine, [*strangers, Request("mine", expected.prompt, params)])["mine"]

    assert sum((o.token_ids for o in outputs), ()) == expected.completion
    first = len(expected.prompt) - 1
    got = sum((o.logprobs for o in outputs), ())
    check_logprobs(got, expected.completion, expected.logprobs[first:-1])
    if scores_prompt:
        scored = sum((o.prompt_logprobs for o in outputs), ())
        assert scored[0] is None
        check_logprobs(scored[1:], expected.prompt[1:], expected.logprobs[:first])
    check_way(engine, way, outputs)


def check_logprobs(
    got: tuple[TokenLogprobs | None, ...], tokens: tuple[int, ...], logprobs: torch.Tensor
) -> None:
    """The whole distribution at every position, and the entry of the token that stands there."""
    assert len(got) == len(tokens) == len(logprobs)
    for entry, token, row in zip(got, tokens, logprobs, strict=True):
        assert entry is not None and entry.token_id == token
        assert abs(entry.logprob - row[token]) < TOLERANCE
        mine = torch.zeros_like(row)
        for token_id, value in entry.top:
            mine[token_id] = value
        assert len(entry.top) == len(row)
        assert (mine - row).abs().max() < TOLERANCE


def check_way(engine: Engine, way: str, outputs: list[RequestOutput]) -> None:
    """What the way is named after really happened."""
    if way == "after-a-prefix-hit":
        assert sum(o.num_cached_tokens for o in outputs) >= 24
    if way == "after-a-preemption":
        assert engine.stats.preemptions > 0
    if way == "drafted":
        assert 0 < engine.stats.spec_accepted_tokens < engine.stats.spec_draft_tokens
