"""The metadata of a GGUF file for a model, from the fields of its `config.json`; and the factors
of its rotary embedding, which GGUF keeps in a tensor.

What readers of the format would compute differently is refused, not written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from vllm_traits import ModelError

from vllm_models.gguf.architectures import ARCHITECTURES, GgufArchitecture
from vllm_models.json_fields import JsonFields

Keys = dict[str, Any]


def architecture_of(fields: JsonFields) -> GgufArchitecture:
    """The row of the table for a checkpoint.

    Raises:
        ModelError: Files of its architecture cannot be written.
    """
    name = fields.get("architectures", list, [""])[0]
    for row in ARCHITECTURES:
        if row.model_class == name and row.model_type in _FAMILIES:
            return row
    known = ", ".join(row.model_class for row in ARCHITECTURES if row.model_type in _FAMILIES)
    raise ModelError(
        f"{fields.source}: no GGUF file can be written for {name}. Supported: {known}. The model "
        "can be used as it is; --isq quantizes it while it is loaded."
    )


def model_keys(fields: JsonFields) -> Keys:
    """All keys that describe the model; none that describe its tokenizer.

    Raises:
        ModelError: A field says what GGUF has no key for.
    """
    row = architecture_of(fields)
    heads, width = fields.positive("num_attention_heads"), head_dim(fields)
    keys: Keys = {
        "block_count": fields.positive("num_hidden_layers"),
        "context_length": fields.positive("max_position_embeddings"),
        "embedding_length": fields.positive("hidden_size"),
        "feed_forward_length": fields.positive("intermediate_size"),
        "vocab_size": fields.positive("vocab_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": fields.positive("num_key_value_heads", heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": fields.get("rms_norm_eps", float, 1e-6),
        **_rope_keys(fields, width),
        **_FAMILIES[row.model_type](fields),
    }
    found: Keys = {"general.architecture": row.name, "general.type": "model"}
    return found | {f"{row.name}.{key}": value for key, value in keys.items()}


def head_dim(fields: JsonFields) -> int:
    """Width of a head."""
    if fields.get("model_type", str, "") == "qwen3" and "head_dim" not in fields.values:
        return 128
    share = fields.positive("hidden_size") // fields.positive("num_attention_heads")
    return fields.positive("head_dim", max(1, share))


def _rope(fields: JsonFields) -> tuple[str, JsonFields]:
    scaling = fields.child("rope_parameters") or fields.child("rope_scaling")
    if scaling is None:
        return "default", fields
    if scaling.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise _refused(scaling, "partial_rotary_factor")
    return scaling.get("rope_type", str, "") or scaling.get("type", str, "default"), scaling


def _rope_keys(fields: JsonFields, width: int) -> Keys:
    kind, scaling = _rope(fields)
    theta = scaling.above_zero("rope_theta", fields.above_zero("rope_theta", 10000.0))
    keys: Keys = {"rope.dimension_count": width, "rope.freq_base": float(theta)}
    if kind in ("default", "llama3"):  # llama3's stretching is in a tensor
        return keys
    if kind == "linear":
        factor = scaling.above_zero("factor", 1.0)
        return keys | {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
    if kind == "yarn":
        return keys | _yarn_keys(fields, scaling)
    raise _refused(scaling, "rope_type")


def _yarn_keys(fields: JsonFields, scaling: JsonFields) -> Keys:
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if scaling.values.get(name) is not None:
            raise _refused(scaling, name)
    if not scaling.get("truncate", bool, True):
        raise _refused(scaling, "truncate")
    length = fields.positive("max_position_embeddings")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.above_zero("factor", 1.0)),
        "rope.scaling.original_context_length": scaling.positive(
            "original_max_position_embeddings", length
        ),
        "rope.scaling.yarn_beta_fast": float(scaling.above_zero("beta_fast", 32.0)),
        "rope.scaling.yarn_beta_slow": float(scaling.above_zero("beta_slow", 1.0)),
    }


def rope_factors(fields: JsonFields) -> list[float]:
    """By what each wavelength is stretched, for the tensor `rope_freqs.weight`; empty if none is.

    Long wavelengths are stretched by the factor, short ones not, and those between by something
    between.
    """
    kind, scaling = _rope(fields)
    if kind != "llama3":
        return []
    theta = scaling.above_zero("rope_theta", fields.above_zero("rope_theta", 10000.0))
    factor, original = (
        scaling.need("factor", float),
        scaling.positive(
            "original_max_position_embeddings", fields.positive("max_position_embeddings")
        ),
    )
    low, high = scaling.need("low_freq_factor", float), scaling.need("high_freq_factor", float)
    width = head_dim(fields)
    found: list[float] = []
    for index in range(0, width, 2):
        turns = original / (2 * math.pi * theta ** (index / width))
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - share) / factor + share))
    return found


def _refused(fields: JsonFields, name: str) -> ModelError:
    value = fields.values.get(name, fields.values.get("type"))
    return ModelError(
        f"{fields.source}: {name} is {value!r}, which readers of GGUF files do not know for this "
        "architecture. The model can be used as it is; --isq quantizes it while it is loaded."
    )


def _only(fields: JsonFields, **usual: object) -> None:
    """Refuse fields with other values than readers take for granted."""
    for name, value in usual.items():
        if fields.values.get(name, value) not in (value, None):
            raise _refused(fields, name)


def _llama(fields: JsonFields) -> Keys:
    _only(fields, hidden_act="silu")
    return {}


def _window(fields: JsonFields) -> Keys:
    _only(fields, hidden_act="silu")
    size = fields.values.get("sliding_window")
    return {} if size is None else {"attention.sliding_window": fields.positive("sliding_window")}


def _mixtral(fields: JsonFields) -> Keys:
    return _window(fields) | {
        "expert_count": fields.positive("num_local_experts"),
        "expert_used_count": fields.positive("num_experts_per_tok"),
    }


def _qwen(fields: JsonFields) -> Keys:
    _only(fields, hidden_act="silu", use_sliding_window=False, attention_bias=False)
    return {}


def _num_experts(fields: JsonFields) -> int:
    """Newer checkpoints have the name that Mixtral uses."""
    name = "num_experts" if "num_experts" in fields.values else "num_local_experts"
    return fields.positive(name)


def _qwen2_moe(fields: JsonFields) -> Keys:
    shared = fields.positive("shared_expert_intermediate_size")
    return _routed(fields, norm=False) | {"expert_shared_feed_forward_length": shared}


def _qwen3_moe(fields: JsonFields) -> Keys:
    return _routed(fields, norm=True)


def _routed(fields: JsonFields, norm: bool) -> Keys:
    """Experts in every layer, whose weights are made to sum to 1 or not."""
    _only(fields, decoder_sparse_step=1, mlp_only_layers=[])
    if fields.get("norm_topk_prob", bool, False) != norm:
        raise _refused(fields, "norm_topk_prob")
    return _qwen(fields) | {
        "expert_count": _num_experts(fields),
        "expert_used_count": fields.positive("num_experts_per_tok"),
        "expert_feed_forward_length": fields.positive("moe_intermediate_size"),
    }


_FAMILIES: Mapping[str, Callable[[JsonFields], Keys]] = {
    "llama": _llama,
    "mistral": _window,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
}
