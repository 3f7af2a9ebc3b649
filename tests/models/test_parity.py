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


def without_layer_types(fields: dict[str, Any]) -> None:
    """The spelling of checkpoints that name the first layer with a window instead."""
    del fields["layer_types"]


def rope(theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling}


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "initializer_range": 0.4}
GPT_OSS = {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "rope_parameters": YARN | {"rope_theta": 500.0, "truncate": False},
}
GEMMA4 = {
    "sliding_window": 6,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "tie_word_embeddings": True,
    "initializer_range": 0.4,
}
GEMMA4_LARGE = GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GLM4_MOE = {
    "family": "glm4_moe",
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
DEEPSEEK = {
    "family": "deepseek_v3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.5, 4.0, 9.0],
    "partial_rotary_factor": 0.5,
}
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
        "mlp_only_layers": [3],
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
    "gemma2": {"family": "gemma2", "sliding_window": 6} | GEMMA,
    "gemma2-wide-heads-odd-layers-caps": {
        "family": "gemma2",
        "sliding_window": 16,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "num_hidden_layers": 3,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    }
    | GEMMA,
    "gemma3": {"family": "gemma3", "sliding_window": 6, "num_hidden_layers": 7} | GEMMA,
    "gemma3-untied-scaled-layers-named": {
        "family": "gemma3",
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 40,
        "initializer_range": 0.3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma4-small-inputs-of-layers-shared-kv": {
        "family": "gemma4",
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 12.0,
    }
    | GEMMA4
    | {"hidden_size_per_layer_input": 8},
    "gemma4-keys-as-values": {"family": "gemma4", "num_hidden_layers": 6} | GEMMA4_LARGE,
    "gemma4-experts-untied": {
        "family": "gemma4",
        "num_hidden_layers": 3,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    }
    | GEMMA4_LARGE
    | {"tie_word_embeddings": False},
    "gpt-oss": {"family": "gpt_oss", "sliding_window": 6} | GPT_OSS,
    "gpt-oss-one-kv-head-odd-layers-tied": {
        "family": "gpt_oss",
        "sliding_window": 16,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "swiglu_limit": 1.5,
        "tie_word_embeddings": True,
        "saved_as": torch.bfloat16,
    }
    | GPT_OSS,
    "llama-dynamic-scaling": rope(500.0, rope_type="dynamic", factor=4.0),
    "phi3": {"family": "phi3", "head_dim": 12},
    "phi3-window-three-layers": {"family": "phi3", "sliding_window": 6, "num_hidden_layers": 3}
    | {"head_dim": 12, "num_key_value_heads": 1},
    "phi4-part-of-heads-long-context-tied": {
        "family": "phi3",
        "head_dim": 16,
        "hidden_size": 64,
        "original_max_position_embeddings": 16,
        "tie_word_embeddings": True,
    }
    | rope(100.0, **LONGROPE),
    "olmo2": {"family": "olmo2"},
    "olmo2-one-kv-head-wide-heads-bias-tied": {
        "family": "olmo2",
        "num_key_value_heads": 1,
        "head_dim": 24,
        "num_hidden_layers": 3,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo3": {"family": "olmo3", "sliding_window": 6, "num_hidden_layers": 5},
    "olmo3-stretched-without-windows-yarn": {
        "family": "olmo3",
        "sliding_window": 9,
        "head_dim": 24,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
    },
    "glm4": {"family": "glm4"},
    "glm4-one-kv-head-no-bias-wide-heads": {
        "family": "glm4",
        "attention_bias": False,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "num_hidden_layers": 3,
    },
    "glm4-moe": GLM4_MOE,
    "glm4-moe-groups-norms-biases": GLM4_MOE
    | {
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 2,
        "use_qk_norm": True,
        "attention_bias": True,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
    },
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3-yarn-plain-queries-halves-rotate": DEEPSEEK
    | {"q_lora_rank": None, "rope_interleave": False, "num_hidden_layers": 3}
    | rope(500.0, **YARN, mscale=1.0, mscale_all_dim=0.7),
    "deepseek-v3-bias-dense-layers": DEEPSEEK
    | {"attention_bias": True, "num_hidden_layers": 3, "first_k_dense_replace": 2},
    "qwen2": {"family": "qwen2"},
    "qwen2-windows-in-late-layers": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
        "rewrite": without_layer_types,
    },
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
    # Blocks of 16 are those that the CPU's attention kernel can read.
    "in-kernels": Way({"block_size": 16}, {"max_batch_tokens": 24}, num_strangers=5),
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


def stranger(number: int, max_tokens: int = 40) -> Request:
    rng = random.Random(number)
    prompt = tuple(rng.choices(range(3, VOCAB_SIZE), k=rng.randint(5, 40)))
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.8]),
        top_k=5,
        seed=number,
        max_tokens=max_tokens,
        ignore_eos=True,
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


# The first variant of every family, and those whose attention or routing is of another kind.
ON_A_GPU = (
    *{
        str(fields.get("family", "llama")): name for name, fields in reversed(VARIANTS.items())
    }.values(),
    "gemma4-experts-untied",
    "glm4-moe-groups-norms-biases",
    "phi4-part-of-heads-long-context-tied",
)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # a sigmoid's, in numpy
@pytest.mark.parametrize("expected", ON_A_GPU, indirect=True)
def test_the_path_of_a_gpu_equals_transformers(expected: Expected, triton_path: None) -> None:
    """A prompt in two chunks beside a stranger, then decode steps of a padded bucket."""
    vocab_size = expected.logprobs.shape[1]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=4,
        ignore_eos=True,
        logprobs=vocab_size,
        prompt_logprobs=vocab_size,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = expected.checkpoint.load(block_size=16, max_sequences=3, device=device)
    engine = Engine(backend, SchedulerConfig(max_batch_tokens=24))
    mine = Request("mine", expected.prompt, params)
    outputs = run(engine, [stranger(1, max_tokens=3), mine])["mine"]

    assert sum((o.token_ids for o in outputs), ()) == expected.completion[:4]
    first = len(expected.prompt) - 1
    got = sum((o.logprobs for o in outputs), ())
    check_logprobs(got, expected.completion[:4], expected.logprobs[first : first + 4])
    scored = sum((o.prompt_logprobs for o in outputs), ())
    check_logprobs(scored[1:], expected.prompt[1:], expected.logprobs[:first])
