"""GGUF files of every architecture against HF transformers with the same weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, load_backend
from vllm_traits import Request, SamplingParams

pytestmark = pytest.mark.usefixtures("torch_products")

ChooseKind = Callable[[str, np.ndarray], Kind]
TOLERANCE = 1e-3
NUM_TOKENS = 16
VOCAB_SIZE = 128
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
TIED = {"tie_word_embeddings": True, "initializer_range": 0.4}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WINDOW = {"sliding_window": 6}
GEMMA3 = {"family": "gemma3", "query_pre_attn_scalar": 16, **WINDOW}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GROUPED = {
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
    **WINDOW,
    **TIED,
}
DEEPSEEK = {
    "family": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
    **GROUPED,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-one-kv-head-tied": {"num_key_value_heads": 1, **TIED},
    "llama-wide-heads-odd-layers": {"head_dim": 24, "num_hidden_layers": 3},
    "llama-both-biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-scaling": {"rope_parameters": LLAMA3},
    "llama-linear-scaling": {"rope_parameters": LINEAR},
    "llama-yarn-scaling": {"rope_parameters": YARN},
    "mistral-window": {"family": "mistral", "sliding_window": 6},
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "num_key_value_heads": 1, **TIED},
    "qwen2-moe": {"family": "qwen2_moe", "shared_expert_intermediate_size": 40, **EXPERTS},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied-wide-heads": {"family": "qwen3", "head_dim": 32, **TIED},
    "qwen3-moe": {"family": "qwen3_moe", "norm_topk_prob": True, **EXPERTS},
    "gemma2": {"family": "gemma2", "query_pre_attn_scalar": 16, **WINDOW, **TIED},
    "gemma3": GEMMA3 | {"num_hidden_layers": 7} | TIED,
    "gemma4": {"family": "gemma4", **GEMMA4},
    "gemma4-per-layer-embeddings": {
        "family": "gemma4",
        **GEMMA4,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 3,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
        "use_double_wide_mlp": True,
    },
    "gemma4-experts": {
        "family": "gemma4",
        **GEMMA4,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "phi3": {"family": "phi3", "rope_parameters": PARTIAL, "sliding_window": 6},
    "phi3-longrope": {
        "family": "phi3",
        "hidden_size": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": [2.0 + i / 8 for i in range(8)],
            "short_factor": [1.0 + i / 8 for i in range(8)],
        },
    },
    "olmo2": {"family": "olmo2"},
    "olmo3": {
        "family": "olmo3",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        **WINDOW,
    },
    "glm4": {"family": "glm4", "attention_bias": True, "rope_parameters": PARTIAL},
    "glm4-moe": {
        "family": "glm4_moe",
        "attention_bias": True,
        "use_qk_norm": True,
        "rope_parameters": PARTIAL,
        **GROUPED,
    },
    "deepseek-v3": DEEPSEEK,
    "deepseek-v3-yarn": DEEPSEEK | {"rope_parameters": YARN | {"mscale": 1, "mscale_all_dim": 1}},
    "gpt-oss": {
        "family": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN | {"truncate": False},
        **WINDOW,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gguf_file_equals_transformers(
    make_checkpoint: Any, converter: Any, variant: str
) -> None:
    checkpoint = make_checkpoint(**VARIANTS[variant])
    check_equal(converter.write(checkpoint), checkpoint)


def mixed(name: str, array: np.ndarray) -> Kind:
    """Several types in one layer, as in files that are named after their most frequent one."""
    if "attn_v" in name or "ffn_down" in name:
        return Kind.Q6_K if array.shape[-1] % 256 == 0 else Kind.Q8_0
    if "ffn_gate_inp" in name:
        return Kind.F32
    return Kind.Q4_K if array.shape[-1] % 256 == 0 else Kind.Q5_0


def all_of(kind: Kind) -> ChooseKind:
    return lambda name, array: Kind.F32 if "ffn_gate_inp" in name else kind


BIG = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.08}
BIG_EXPERTS = EXPERTS | {"moe_intermediate_size": 256, "norm_topk_prob": True}
QUANTIZED: dict[str, tuple[dict[str, Any], ChooseKind]] = {
    "llama-f16": ({}, all_of(Kind.F16)),
    "llama-bf16-tied": (TIED, all_of(Kind.BF16)),
    "llama-q8_0": ({"hidden_size": 64, "intermediate_size": 96}, all_of(Kind.Q8_0)),
    "llama-mixed-tied": (BIG | {"tie_word_embeddings": True}, mixed),
    "mixtral-mixed": ({"family": "mixtral", "num_local_experts": 4, **BIG}, mixed),
    "qwen2-mixed": ({"family": "qwen2", **BIG}, mixed),
    "qwen3-mixed": ({"family": "qwen3", **BIG}, mixed),
    "gemma3-mixed": (GEMMA3 | TIED | BIG, mixed),
    "qwen3-moe-mixed": ({"family": "qwen3_moe", **BIG, **BIG_EXPERTS}, mixed),
}


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("variant", QUANTIZED)
def test_a_quantized_file_equals_transformers_with_the_dequantized_weights(
    make_checkpoint: Any, converter: Any, variant: str
) -> None:
    changes, kind = QUANTIZED[variant]
    checkpoint = make_checkpoint(**changes)
    check_equal(converter.write(checkpoint, kind), converter.rounded(checkpoint, kind))


def four_bit_experts(name: str, array: np.ndarray) -> Kind:
    return Kind.MXFP4 if "_exps" in name else Kind.Q8_0


@pytest.mark.usefixtures("torch_products")
def test_experts_in_four_bits_equal_transformers_with_the_dequantized_weights(
    make_checkpoint: Any, converter: Any
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    checkpoint = make_checkpoint(**VARIANTS["gpt-oss"] | sizes)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    exact = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, array in exact.items():
        if ".experts." in name and array.ndim == 3:  # [E, in, out]; blocks run along the inputs
            exact[name] = rounded(array.swapaxes(1, 2), Kind.MXFP4).swapaxes(1, 2)
        elif array.ndim == 2 and not name.endswith("bias"):
            exact[name] = rounded(array, Kind.Q8_0)
    checkpoint = converter.with_weights(checkpoint, exact)
    check_equal(converter.write(checkpoint, four_bit_experts), checkpoint)


def rounded(array: np.ndarray, kind: Kind) -> np.ndarray:
    """The numbers of blocks, of which the same blocks come again."""
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(array), kind), kind)


def check_equal(path: Path, checkpoint: Any) -> None:
    """Greedy tokens, and the whole distribution at every position of prompt and completion."""
    prompt = tuple(random.Random(7).choices(range(3, VOCAB_SIZE), k=29))
    completion = checkpoint.greedy(prompt, NUM_TOKENS)
    expected = checkpoint.logits(prompt + completion).log_softmax(-1)
    got_tokens, got = complete(path, prompt, expected.shape[1])
    assert got_tokens == completion
    assert (got - expected[:-1]).abs().max() < TOLERANCE


def complete(path: Path, prompt: tuple[int, ...], width: int) -> tuple[tuple[int, ...], Any]:
    """Greedy tokens, and log-probabilities [positions - 1, V]."""
    options = BackendOptions(path, dtype="f32", device="cpu", block_size=4, num_blocks=64)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=width,
        prompt_logprobs=width,
    )
    engine = Engine(load_backend(options), SchedulerConfig())
    engine.add(Request("one", prompt, params))
    outputs = [output for _ in range(100) if engine.has_work() for output in engine.step()]
    entries = sum((o.prompt_logprobs for o in outputs), ())[1:]
    entries += sum((o.logprobs for o in outputs), ())
    found = torch.zeros(len(entries), width)
    for row, entry in zip(found, entries, strict=True):
        for token_id, value in entry.top:
            row[token_id] = value
    return sum((o.token_ids for o in outputs), ()), found
