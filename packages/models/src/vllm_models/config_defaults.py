"""What a `config.json` may leave out because its model type implies it, and where text models hide
in the configuration of multimodal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_models.json_fields import JsonFields

_GEMMA: Mapping[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_GLM: Mapping[str, Any] = {"partial_rotary_factor": 0.5}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "glm4": _GLM | {"head_dim": 128, "rms_norm_eps": 1.5625e-07, "rope_interleave": True},
    "glm4_moe": _GLM,
    "deepseek_v3": {"rope_interleave": True, "norm_topk_prob": True},
    "olmo2": {"rms_norm_eps": 1e-5},
    "olmo3": {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500000.0},
    "phi3": {"rms_norm_eps": 1e-5},
    "gpt_oss": {"head_dim": 64, "attention_bias": True, "rms_norm_eps": 1e-5},
    "gemma2": _GEMMA
    | {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
        "num_hidden_layers": 26,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma3_text": _GEMMA
    | {
        "max_position_embeddings": 131072,
        "num_hidden_layers": 26,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "vocab_size": 262208,
    },
    "gemma4_text": _GEMMA
    | {
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 256,
        "max_position_embeddings": 131072,
        "num_hidden_layers": 30,
        "sliding_window": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
}
_PERIODS = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "gemma4_text": 6, "olmo3": 4}
_NULL_IS_A_VALUE = frozenset(
    {"attn_logit_softcapping", "final_logit_softcapping", "sliding_window"}
)


def complete(fields: JsonFields) -> JsonFields:
    """The fields of the text model, with what they leave out."""
    text = fields.child("text_config")
    if text is not None:
        inherited = {
            k: v for k, v in fields.values.items() if k not in ("text_config", "model_type")
        }
        own = {k: v for k, v in text.values.items() if k != "architectures"}
        fields = JsonFields(inherited | own, text.source)
    defaults = _DEFAULTS.get(fields.get("model_type", str, ""), {})
    given = {
        name: value
        for name, value in fields.values.items()
        if value is not None or name in _NULL_IS_A_VALUE or name not in defaults
    }
    return JsonFields({**defaults, **given}, fields.source)


def layer_types(fields: JsonFields, num_layers: int) -> list[Any]:
    """Whether each layer has a window: as the file says, or by the rule of its model type."""
    found = fields.get("layer_types", list, [])
    model_type = fields.get("model_type", str, "")
    if not found and fields.get("use_sliding_window", bool, False):
        first = fields.get("max_window_layers", int, 28)
        return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if found or model_type not in _PERIODS:
        return found
    period = fields.positive("sliding_window_pattern", _PERIODS[model_type])
    kinds = ("full_attention", "sliding_attention")
    is_last_full = model_type == "gemma4_text"
    return [
        kinds[(layer + 1) % period != 0 and not (is_last_full and layer + 1 == num_layers)]
        for layer in range(num_layers)
    ]
