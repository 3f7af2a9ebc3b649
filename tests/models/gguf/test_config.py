"""What a file's metadata becomes as fields of a `config.json`, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_models.gguf.config import config_fields
from vllm_models.gguf.header import GgufHeader, TensorInfo
from vllm_models.gguf.types import GgmlType
from vllm_traits import ModelError

PATH = Path("tiny.gguf")
COMMON = {
    "context_length": 256,
    "embedding_length": 48,
    "block_count": 2,
    "feed_forward_length": 80,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
MIXTURE = {"expert_count": 6, "expert_used_count": 2}


def header(
    architecture: str = "llama",
    *,
    tensors: dict[str, tuple[int, ...]] | None = None,
    whole: dict[str, Any] | None = None,
    **keys: Any,
) -> GgufHeader:
    """A header with the common keys; None leaves one out, "__" stands for "."."""
    metadata: dict[str, Any] = {"general.architecture": architecture}
    for key, value in (COMMON | {k.replace("__", "."): v for k, v in keys.items()}).items():
        if value is not None:
            metadata[f"{architecture}.{key}"] = value
    shapes = {"token_embd.weight": (128, 48)} | (tensors or {})
    infos = {n: TensorInfo(n, s, GgmlType.F32, PATH, 0, 4) for n, s in shapes.items()}
    return GgufHeader(metadata | (whole or {}), infos, (PATH,))


def fields(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(config_fields(header(*args, **kwargs)).values)


def test_common_keys_become_common_fields() -> None:
    assert fields(rope__freq_base=500.0) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": [],
    }


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("llama", {}, "LlamaForCausalLM"),
        ("llama", {"attention__sliding_window": 64}, "MistralForCausalLM"),
        ("llama", {"attention__sliding_window": 0}, "LlamaForCausalLM"),
        ("llama", MIXTURE, "MixtralForCausalLM"),
        ("qwen2", {}, "Qwen2ForCausalLM"),
        ("qwen2moe", MIXTURE, "Qwen2MoeForCausalLM"),
        ("qwen3", {}, "Qwen3ForCausalLM"),
        ("qwen3moe", MIXTURE, "Qwen3MoeForCausalLM"),
    ],
)
def test_the_class_follows_from_architecture_experts_and_window(
    architecture: str, keys: dict[str, Any], expected: str
) -> None:
    assert fields(architecture, **keys)["architectures"] == [expected]


def test_a_head_of_its_own_output_and_biases_follow_from_the_tensors() -> None:
    found = fields(
        tensors={
            "output.weight": (128, 48),
            "blk.0.attn_output.bias": (48,),
            "blk.0.ffn_down.bias": (48,),
        },
        attention__key_length=24,
        attention__value_length=24,
    )
    assert found["tie_word_embeddings"] is False
    assert found["attention_bias"] and found["mlp_bias"]
    assert found["head_dim"] == 24


def test_layers_without_experts_are_dense() -> None:
    found = fields(
        "qwen2moe",
        **MIXTURE,
        expert_feed_forward_length=24,
        expert_shared_feed_forward_length=40,
        tensors={"blk.1.ffn_gate_inp.weight": (6, 48)},
    )
    assert found["mlp_only_layers"] == [0]
    assert (found["num_experts"], found["num_experts_per_tok"]) == (6, 2)
    assert (found["moe_intermediate_size"], found["shared_expert_intermediate_size"]) == (24, 40)
    assert found["norm_topk_prob"] is False
    assert fields("qwen3moe", **MIXTURE)["norm_topk_prob"] is True
    assert fields("qwen3moe", **MIXTURE, expert_weights_norm=False)["norm_topk_prob"] is False


def test_values_of_each_layer_may_be_an_array() -> None:
    found = fields(attention__head_count_kv=[2, 2], feed_forward_length=[80, 80, 7])
    assert (found["num_key_value_heads"], found["intermediate_size"]) == (2, 80)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {"rope_type": "default"}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, {"rope_type": "default"}),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 64,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        ),
        ({"rope__dimension_count": 6}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ],
)
def test_rope_keys_become_rope_parameters(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    assert fields(**keys)["rope_parameters"] == {"rope_theta": 10000.0} | expected


def with_factors(tmp_path: Path, factors: list[float], **keys: Any) -> GgufHeader:
    path = tmp_path / "factors"
    path.write_bytes(b"before" + np.array(factors, "<f4").tobytes())
    made = header(**keys)
    name = "rope_freqs.weight"
    info = TensorInfo(name, (len(factors),), GgmlType.F32, path, 6, 4 * len(factors))
    return GgufHeader(made.metadata, {**made.tensors, name: info}, made.paths)


def test_factors_of_wavelengths_are_longrope_for_any_length(tmp_path: Path) -> None:
    rope = config_fields(with_factors(tmp_path, [1, 1, 1.5, 2, 4, 8])).values["rope_parameters"]
    assert rope["rope_type"] == "longrope" and rope["attention_factor"] == 1.0
    assert rope["long_factor"] == rope["short_factor"] == [1, 1, 1.5, 2, 4, 8]


@pytest.mark.parametrize("factors", [[1.0] * 5, [1.0] * 5 + [0.0], [1.0] * 5 + [float("nan")]])
def test_bad_factors_of_wavelengths_are_refused(tmp_path: Path, factors: list[float]) -> None:
    with pytest.raises(ModelError, match=r"factors: rope_freqs\.weight (must be 6|holds numbers)"):
        config_fields(with_factors(tmp_path, factors))


TOKENS = {
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "<|im_end|>", "<|eot_id|>", "<|end|>"],
    "tokenizer.ggml.token_type": [3, 3, 1, 3, 1, 3],
}


def test_every_end_of_a_turn_ends_a_completion() -> None:
    ids = {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 2}
    assert fields(whole=ids)["eos_token_id"] == [1, 2]
    assert fields(whole=ids | TOKENS)["eos_token_id"] == [1, 2, 3, 5]


def test_the_end_of_a_message_is_no_end_where_messages_follow() -> None:
    tokens = TOKENS["tokenizer.ggml.tokens"] + ["<|return|>"]
    types = TOKENS["tokenizer.ggml.token_type"] + [3]
    whole = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert fields(whole=whole)["eos_token_id"] == [3]


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (
            "mamba",
            {},
            r"tiny\.gguf: the architecture 'mamba' is not supported\. Supported: .*qwen3",
        ),
        ("llama", {"block_count": None}, r"tiny\.gguf lacks the key 'llama\.block_count'"),
        ("qwen3", {"embedding_length": 0}, r"'qwen3\.embedding_length' is 0, but must be 1 to"),
        ("llama", {"block_count": 1 << 40}, r"'llama\.block_count' is \d+, but must be 1 to 1000"),
        ("llama", {"context_length": "long"}, r"length' is 'long', but must be an integer"),
        ("llama", {"embedding_length": [1] * 9}, r"length' is an array, but must be an integer"),
        ("llama", {"attention__head_count": [4, 2]}, r"head_count' is \[2, 4\], but must be one"),
        ("llama", {"attention__head_count": [4]}, r"has 1 entries, but there are 2 layers"),
        (
            "llama",
            {"attention__layer_norm_rms_epsilon": float("nan")},
            r"is nan, but must be",
        ),
        ("llama", {"attention__value_length": 7}, r"value_length' is not 12 as the keys have it"),
        ("llama", {"rope__scaling__type": "su"}, r"scaling\.type' is 'su', which is not supported"),
        (
            "llama",
            {"feed_forward_length": 1 << 60},
            r"_length' is \d+, but must be 1 to",
        ),
        ("llama", {"embedding_length": 64}, r"length' is 64, but embeddings have 48"),
        (
            "llama",
            {"rope__dimension_count": 14},
            r"_count' is 14, but must be even, up to 12",
        ),
        (
            "qwen3moe",
            MIXTURE | {"expert_count": 1 << 20},
            r"expert_count' is \d+, but must be 1 to 1024",
        ),
        ("qwen2moe", {}, r"tiny\.gguf lacks the key 'qwen2moe\.expert_used_count'"),
    ],
)
def test_bad_metadata_is_refused_with_file_and_key(
    architecture: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        fields(architecture, **keys)


def test_a_file_without_architecture_or_embedding_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks the key 'general\.architecture'"):
        config_fields(GgufHeader({}, {}, (PATH,)))
    with pytest.raises(ModelError, match=r"lacks the matrix 'token_embd\.weight'"):
        config_fields(GgufHeader(header().metadata, {}, (PATH,)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(GgmlType.F16, "float16"), (GgmlType.BF16, "bfloat16"), (GgmlType.Q4_K, "bfloat16")],
)
def test_the_element_type_is_that_of_the_largest_tensor(kind: GgmlType, expected: str) -> None:
    made = header()
    big = TensorInfo("blk.0.ffn_up.weight", (80, 48), kind, PATH, 0, 999)
    with_big = GgufHeader(made.metadata, {**made.tensors, big.name: big}, made.paths)
    assert config_fields(with_big).values["dtype"] == expected


def test_gemma_2_has_caps_and_the_largest_divides_scores_by_another_number() -> None:
    found = fields("gemma2", attention__sliding_window=64)
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (50.0, 30.0)
    assert found["layer_types"] == ["sliding_attention", "full_attention"]
    assert found["query_pre_attn_scalar"] == 12
    large = fields("gemma2", attention__sliding_window=64, block_count=46, attention__key_length=16)
    assert (large["head_dim"], large["query_pre_attn_scalar"]) == (16, 12)


def test_gemma_3_has_two_rotations() -> None:
    found = fields(
        "gemma3",
        attention__sliding_window=64,
        block_count=6,
        rope__freq_base=1e6,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    )
    assert found["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert found["rope_parameters"] == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    assert found["final_logit_softcapping"] is None


def test_layer_kinds_are_as_the_file_says() -> None:
    window = {"attention__sliding_window": 64}
    pattern = "attention__sliding_window_pattern"
    near, far = "sliding_attention", "full_attention"
    assert fields("gemma3", **window, **{pattern: 2})["layer_types"] == [near, far]
    assert fields("gemma3", **window, **{pattern: [False, True]})["layer_types"] == [far, near]
    with pytest.raises(ModelError, match=r"sliding_window_pattern' is 1, but must be true or fals"):
        fields("gemma3", **window, **{pattern: [1, 0]})


def test_olmo_with_a_window_is_olmo_3_whose_near_layers_are_not_stretched() -> None:
    stretch = {"rope__scaling__type": "yarn", "rope__scaling__factor": 8.0}
    assert fields("olmo2")["architectures"] == ["Olmo2ForCausalLM"]
    found = fields("olmo2", attention__sliding_window=64, block_count=4, **stretch)
    assert found["architectures"] == ["Olmo3ForCausalLM"]
    assert found["layer_types"] == ["sliding_attention"] * 3 + ["full_attention"]
    rope = found["rope_parameters"]
    assert (rope["sliding_attention"]["rope_type"], rope["full_attention"]["rope_type"]) == (
        "default",
        "yarn",
    )


GROUPED = MIXTURE | {
    "expert_feed_forward_length": 24,
    "expert_shared_count": 1,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
}


def test_layers_that_draft_several_tokens_are_none_of_the_model() -> None:
    found = fields("glm4moe", block_count=3, nextn_predict_layers=1, **GROUPED)
    assert found["num_hidden_layers"] == 2
    assert found["first_k_dense_replace"] == 1 and found["use_qk_norm"] is False
    assert (found["n_routed_experts"], found["n_shared_experts"]) == (6, 1)
    assert (found["routed_scaling_factor"], found["norm_topk_prob"]) == (2.5, True)


LATENT = GROUPED | {
    "attention__q_lora_rank": 24,
    "attention__kv_lora_rank": 32,
    "rope__dimension_count": 8,
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 40.0,
    "rope__scaling__original_context_length": 64,
    "rope__scaling__yarn_log_multiplier": 0.1,
}


@pytest.mark.parametrize("is_split", [True, False])
def test_latent_attention_has_widths_of_its_own(is_split: bool) -> None:
    whole = {"attention__key_length": 24, "attention__value_length": 12}
    parted = {
        "attention__head_count_kv": 1,
        "attention__key_length": 40,
        "attention__value_length": 32,
        "attention__key_length_mla": 24,
        "attention__value_length_mla": 12,
    }
    tensors = {"blk.0.attn_k_b.weight": (4, 32, 16)} if is_split else {}
    found = fields("deepseek2", **LATENT | (parted if is_split else whole), tensors=tensors)
    assert (found["qk_nope_head_dim"], found["qk_rope_head_dim"], found["v_head_dim"]) == (
        16,
        8,
        12,
    )
    assert (found["q_lora_rank"], found["kv_lora_rank"]) == (24, 32)
    assert (found["num_key_value_heads"], found["head_dim"]) == (4, 8)
    rope = found["rope_parameters"]
    assert (rope["factor"], rope["mscale"], rope["mscale_all_dim"]) == (40.0, 1.0, 1.0)
    assert "partial_rotary_factor" not in rope


def test_an_older_deepseek_is_refused() -> None:
    keys = LATENT | {"attention__key_length": 24, "attention__value_length": 12}
    with pytest.raises(ModelError, match=r"expert_gating_func' must be 2, the sigmoid"):
        fields("deepseek2", **keys | {"expert_gating_func": 1})
