"""Reading `config.json` of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm_models import ModelConfig
from vllm_models.pooling_config import default_pooling
from vllm_models.weights.safetensors import SafetensorsCheckpoint
from vllm_traits import ModelError, PoolingParams

MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(folder: Path, **changes: Any) -> ModelConfig:
    fields = {k: v for k, v in (MINIMAL | changes).items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(fields))
    return read_config(folder)


def read_config(folder: Path) -> ModelConfig:
    checkpoint = SafetensorsCheckpoint(folder)
    return ModelConfig.from_fields(checkpoint.fields, checkpoint.eos_token_ids)


def test_absent_fields_take_the_defaults_of_the_format(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 16, 1e-6)
    assert (config.rope.kind, config.rope.theta) == ("default", 10000.0)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)
    assert config.dtype == "" and config.eos_token_ids == frozenset()


def test_qwen3_without_head_dim_has_heads_of_128(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="qwen3").head_dim == 128


def test_old_and_new_rope_fields_read_the_same(tmp_path: Path) -> None:
    old = read(
        tmp_path,
        rope_theta=500000,
        rope_scaling={"type": "llama3", "original_max_position_embeddings": 8192, **LLAMA3},
    )
    new = read(
        tmp_path,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
            **LLAMA3,
        },
    )
    assert old.rope == new.rope
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("llama3", 500000.0, 8.0)
    assert old.rope.original_max_position == 8192


def test_both_spellings_of_the_dtype_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert read(tmp_path, dtype="float16").dtype == "float16"


def test_end_of_sequence_ids_of_both_files_count(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == {2, 3, 4}


BAD = {
    "max_position_embeddings": [2**40],
    "hidden_size": [None, "64", 64.0, 0, -1, True, [64]],
    "num_hidden_layers": ["absent", {}, 10**9],
    "architectures": [None, [], "Llama", [3]],
    "num_key_value_heads": [3, 0],
    "head_dim": [15, "16"],
    "rms_norm_eps": ["small", float("nan"), float("inf"), 10**400],
    "tie_word_embeddings": [1, "yes"],
    "eos_token_id": ["</s>", [2, None], 100, -1],
    "rope_theta": ["big", 0, -1.0],
    "rope_scaling": [
        "linear",
        {"rope_type": "dynamic"},
        {"rope_type": "longrope"},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "longrope", "short_factor": [], "long_factor": []},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": ["2"]},
        {"rope_type": "yarn", "factor": 2.0, "mscale": "1"},
    ],
    "rope_parameters": [{"rope_type": "default", "partial_rotary_factor": 1.5}],
    "partial_rotary_factor": [0, "0.5", 2.0],
    "hidden_act": ["gelu"],
    "layer_types": [["full_attention", "sliding_attention"]],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_what_is_wrong_or_unsupported_is_refused_by_name(
    tmp_path: Path, name: str, value: Any
) -> None:
    with pytest.raises(ModelError) as refused:
        read(tmp_path, **{name: value})
    assert "config.json" in str(refused.value)
    named = (name, value.get("rope_type") if isinstance(value, dict) else None)
    spelled = (*named, "sliding", "high_freq_factor", name.removesuffix("s"))
    assert any(word and word in str(refused.value) for word in spelled)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "nul", "\xff", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)


def write_pooling(folder: Path, fields: dict[str, Any], normalise: bool) -> None:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))
    kind = "Normalize" if normalise else "Pooling"
    modules = [{"idx": 0, "type": f"sentence_transformers.models.{kind}"}]
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize(
    ("flag", "pooling"),
    [
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_cls_token", "cls"),
    ],
)
@pytest.mark.parametrize("normalise", [True, False])
def test_sentence_transformers_pooling_becomes_the_default(
    tmp_path: Path, flag: str, pooling: Any, normalise: bool
) -> None:
    off = {"pooling_mode_max_tokens": False, "word_embedding_dimension": 64}
    write_pooling(tmp_path, {**off, flag: True}, normalise)
    assert default_pooling(tmp_path) == PoolingParams(pooling, normalise)


def test_other_poolings_are_refused_and_none_is_no_default(tmp_path: Path) -> None:
    assert default_pooling(tmp_path) is None
    write_pooling(tmp_path, {"pooling_mode_max_tokens": True}, False)
    with pytest.raises(ModelError, match="pooling_mode_max_tokens"):
        default_pooling(tmp_path)
