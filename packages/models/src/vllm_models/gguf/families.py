"""Fields of a Hugging Face `config.json` that only some architectures have, from GGUF metadata.

One function for each family; keyed by `model_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllm_models.gguf.metadata import Metadata
from vllm_models.gguf.rope import Fields, factors, head_dim, rope_parameters

_SIGMOID = 2  # of expert_gating_func
_STILL = 1e20  # a factor that stands for no rotation at all


def _mistral(m: Metadata) -> Fields:
    return {"sliding_window": m.find(".attention.sliding_window", int)}


def _mixtral(m: Metadata) -> Fields:
    return _mistral(m) | {
        "num_local_experts": m.positive(".expert_count"),
        "num_experts_per_tok": m.positive(".expert_used_count"),
    }


def _routed(m: Metadata) -> Fields:
    """Experts in the layers that have some; the others are dense."""
    chosen = m.positive(".expert_used_count")
    layers = range(m.num_layers)
    width = m.find(".expert_feed_forward_length", int)
    return {
        "num_experts": m.positive(".expert_count"),
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width or m.same(".feed_forward_length") // chosen,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n in layers if not m.has("ffn_gate_inp.weight", n)],
    }


def _qwen2_moe(m: Metadata) -> Fields:
    shared = m.find(".expert_shared_feed_forward_length", int)
    return _routed(m) | {
        "shared_expert_intermediate_size": shared or m.same(".feed_forward_length"),
        "norm_topk_prob": m.get(".expert_weights_norm", bool, False),
        "qkv_bias": m.has("attn_q.bias"),
    }


def _qwen3_moe(m: Metadata) -> Fields:
    return _routed(m) | {"norm_topk_prob": m.get(".expert_weights_norm", bool, True)}


def _phi3(m: Metadata) -> Fields:
    original = m.get(".rope.scaling.original_context_length", int, 0)
    window = m.get(".attention.sliding_window", int, 0)
    return {
        "original_max_position_embeddings": original or m.positive(".context_length"),
        "sliding_window": window or None,
    }


def _olmo3(m: Metadata) -> Fields:
    """Only layers that see everything are stretched to longer contexts."""
    full = rope_parameters(m)
    plain = {"rope_type": "default", "rope_theta": full["rope_theta"]}
    return {
        "sliding_window": m.positive(".attention.sliding_window"),
        "layer_types": _layer_types(m, 4),
        "rope_parameters": {"sliding_attention": plain, "full_attention": full},
    }


def _glm4(m: Metadata) -> Fields:
    return {"attention_bias": m.has("attn_q.bias")}


def _glm4_moe(m: Metadata) -> Fields:
    return _glm4(m) | _grouped_experts(m) | {"use_qk_norm": m.has("attn_q_norm.weight")}


def _grouped_experts(m: Metadata) -> Fields:
    """Experts in groups, of which some are chosen first; beside some that all tokens share."""
    return {
        "n_routed_experts": m.positive(".expert_count"),
        "num_experts_per_tok": m.positive(".expert_used_count"),
        "n_shared_experts": m.get(".expert_shared_count", int, 0),
        "moe_intermediate_size": m.positive(".expert_feed_forward_length"),
        "first_k_dense_replace": m.get(".leading_dense_block_count", int, 0),
        "routed_scaling_factor": m.get(".expert_weights_scale", float, 1.0),
        "norm_topk_prob": m.get(".expert_weights_norm", bool, False),
        "n_group": m.positive(".expert_group_count", 1),
        "topk_group": m.positive(".expert_group_used_count", 1),
    }


def _deepseek_v3(m: Metadata) -> Fields:
    """Keys and values are made from one narrow vector, whose width has a key of its own."""
    if m.get(".expert_gating_func", int, 1) != _SIGMOID:
        raise m.error(".expert_gating_func", "must be 2, the sigmoid of DeepSeek-V3")
    rotated = m.positive(".rope.dimension_count")
    is_split = m.has("attn_k_b.weight")
    form = "_mla" if is_split else ""
    rope = rope_parameters(m, rotated)
    scale = m.get(".rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1
    if rope["rope_type"] == "yarn" and scale:
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return _grouped_experts(m) | {
        "num_key_value_heads": m.same(".attention.head_count"),
        "head_dim": rotated,
        "q_lora_rank": m.find(".attention.q_lora_rank", int),
        "kv_lora_rank": m.positive(".attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": m.positive(f".attention.key_length{form}") - rotated,
        "v_head_dim": m.positive(f".attention.value_length{form}"),
        "rope_interleave": True,
        "rope_parameters": rope,
    }


def _gemma2(m: Metadata) -> Fields:
    return _gemma(m) | {
        "layer_types": _layer_types(m, 2),
        "query_pre_attn_scalar": _scalar(m, largest=46),
        "attn_logit_softcapping": m.get(".attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": m.get(".final_logit_softcapping", float, 30.0),
    }


def _gemma3(m: Metadata) -> Fields:
    return _gemma(m) | {
        "layer_types": _layer_types(m, 6),
        "query_pre_attn_scalar": _scalar(m, largest=62),
        "rope_parameters": {
            "sliding_attention": _near_rope(m),
            "full_attention": rope_parameters(m),
        },
    }


def _gemma(m: Metadata) -> Fields:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": m.positive(".attention.sliding_window"),
        "attn_logit_softcapping": m.find(".attn_logit_softcapping", float),
        "final_logit_softcapping": m.find(".final_logit_softcapping", float),
    }


def _gemma4(m: Metadata) -> Fields:
    """Layers that see everything have wider heads, of which a part is rotated."""
    types = _layer_types(m, 6)
    first = {kind: types.index(kind) for kind in types[::-1]}
    near, far = first.get("sliding_attention", 0), first.get("full_attention", 0)
    heads = m.per_layer(".attention.head_count_kv", int)
    widths = m.per_layer(".feed_forward_length", int)
    per_layer = m.get(".embedding_length_per_layer_input", int, 0)
    return _gemma(m) | {
        "layer_types": types,
        "head_dim": m.positive(".attention.key_length_swa", head_dim(m)),
        "global_head_dim": head_dim(m),
        "num_key_value_heads": heads[near],
        "num_global_key_value_heads": heads[far],
        "attention_k_eq_v": not m.has("attn_v.weight", far),
        "num_kv_shared_layers": m.get(".attention.shared_kv_layers", int, 0),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": min(widths) < max(widths),
        "hidden_size_per_layer_input": per_layer,
        "vocab_size_per_layer_input": m.header.tensors["token_embd.weight"].shape[0],
        "rope_parameters": {"sliding_attention": _near_rope(m), "full_attention": _far_rope(m)},
        **_gemma4_experts(m),
    }


def _gemma4_experts(m: Metadata) -> Fields:
    if not m.has("ffn_gate_inp.weight"):
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": m.positive(".expert_count"),
        "top_k_experts": m.positive(".expert_used_count"),
        "moe_intermediate_size": m.positive(".expert_feed_forward_length"),
    }


def _near_rope(m: Metadata) -> Fields:
    return {"rope_type": "default", "rope_theta": m.get(".rope.freq_base_swa", float, 10000.0)}


def _far_rope(m: Metadata) -> Fields:
    """GGUF slows the pairs that are not rotated down to nothing."""
    width = head_dim(m)
    slow = factors(m, "rope_freqs.weight", width)
    return {
        "rope_type": "proportional",
        "rope_theta": m.get(".rope.freq_base", float, 1000000.0),
        "partial_rotary_factor": sum(factor < _STILL for factor in slow) / len(slow),
    }


def _gpt_oss(m: Metadata) -> Fields:
    return {
        "num_local_experts": m.positive(".expert_count"),
        "num_experts_per_tok": m.positive(".expert_used_count"),
        "intermediate_size": m.positive(".expert_feed_forward_length"),
        "sliding_window": m.positive(".attention.sliding_window"),
        "layer_types": _layer_types(m, 2),
        "rope_parameters": rope_parameters(m) | {"truncate": False},
    }


def _scalar(m: Metadata, largest: int) -> int:
    """What attention scores are divided by, squared; no key has it. The largest model of a series,
    known by its layers, has another one than the width of its heads."""
    if m.num_layers == largest:
        return m.positive(".embedding_length") // m.same(".attention.head_count")
    return head_dim(m)


def _layer_types(m: Metadata, period: int) -> list[str]:
    """Which layers have a window: as the file says, else all but each `period`-th."""
    key = ".attention.sliding_window_pattern"
    if isinstance(m.header.metadata.get(m.full(key)), list):
        near = m.per_layer(key, bool)
    else:
        period = m.positive(key, period)
        near = [(layer + 1) % period != 0 for layer in range(m.num_layers)]
    return ["sliding_attention" if is_near else "full_attention" for is_near in near]


FAMILIES: Mapping[str, Callable[[Metadata], Fields]] = {
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "phi3": _phi3,
    "olmo3": _olmo3,
    "glm4": _glm4,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek_v3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
}
