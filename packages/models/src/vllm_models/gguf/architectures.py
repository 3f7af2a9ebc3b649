"""Which Hugging Face model each GGUF architecture is, and what its tensors are called there.

Tables only. A tensor is named "blk.3.attn_q.weight" in GGUF and "model.layers.3.self_attn.q_proj.
weight" in Hugging Face checkpoints; the tables map the part between layer and suffix. "{}" in a
Hugging Face name stands for the number of an expert of a stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_ATTENTION = {"attn_norm": "input_layernorm"} | _PROJECTIONS
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_SHARED_EXPERTS = {
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
_LATENT_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
}
_FUSED = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
} | _FUSED_MLP
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM4_NORMS = {
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_GEMMA4 = {
    "layer_output_scale.weight": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
}
_GEMMA4_TOP = {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_DENSE = _ATTENTION | _PRE_NORM | _MLP
_OLMO = _PROJECTIONS | _HEAD_NORMS | _MLP | _POST_NORMS
_GEMMA = _ATTENTION | _MLP | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}


@dataclass(frozen=True)
class GgufArchitecture:
    """How one kind of model is written in GGUF.

    Attributes:
        name: `general.architecture`, which is also the prefix of its metadata.
        model_class: First entry of `architectures` in a Hugging Face `config.json`.
        model_type: Its `model_type`.
        tensors: Names inside a layer, GGUF to Hugging Face; without suffix, unless it differs.
        paired_rows: Tensors whose rows GGUF keeps with the two halves of each head interleaved,
            so that neighbours are rotated together.
        offset_norms: GGUF holds the weights of the norms as they are multiplied, Hugging Face
            less 1.
        top: Names outside the layers, like `tensors`.
    """

    name: str
    model_class: str
    model_type: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    paired_rows: frozenset[str] = frozenset()
    offset_norms: bool = False
    top: Mapping[str, str] = field(default_factory=lambda: _TOP)


_PAIRED = frozenset({"attn_q", "attn_k"})

ARCHITECTURES = (
    GgufArchitecture("llama", "LlamaForCausalLM", "llama", _DENSE, _PAIRED),
    GgufArchitecture("llama", "MistralForCausalLM", "mistral", _DENSE, _PAIRED),
    GgufArchitecture(
        "llama",
        "MixtralForCausalLM",
        "mixtral",
        _ATTENTION | _PRE_NORM | _MIXTRAL_EXPERTS,
        _PAIRED,
    ),
    GgufArchitecture("qwen2", "Qwen2ForCausalLM", "qwen2", _DENSE),
    GgufArchitecture(
        "qwen2moe", "Qwen2MoeForCausalLM", "qwen2_moe", _DENSE | _EXPERTS | _SHARED_EXPERT
    ),
    GgufArchitecture("qwen3", "Qwen3ForCausalLM", "qwen3", _DENSE | _HEAD_NORMS),
    GgufArchitecture(
        "qwen3moe", "Qwen3MoeForCausalLM", "qwen3_moe", _DENSE | _HEAD_NORMS | _EXPERTS
    ),
    GgufArchitecture("phi3", "Phi3ForCausalLM", "phi3", _FUSED),
    GgufArchitecture("olmo2", "Olmo2ForCausalLM", "olmo2", _OLMO),
    GgufArchitecture("olmo2", "Olmo3ForCausalLM", "olmo3", _OLMO),
    GgufArchitecture("glm4", "Glm4ForCausalLM", "glm4", _ATTENTION | _GLM4_NORMS | _FUSED_MLP),
    GgufArchitecture(
        "glm4moe",
        "Glm4MoeForCausalLM",
        "glm4_moe",
        _ATTENTION
        | _HEAD_NORMS
        | _MLP
        | _EXPERTS
        | _SHARED_EXPERTS
        | {"post_attention_norm": "post_attention_layernorm"},
    ),
    GgufArchitecture(
        "deepseek2",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        _LATENT_ATTENTION | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS,
    ),
    GgufArchitecture("gemma2", "Gemma2ForCausalLM", "gemma2", _GEMMA, offset_norms=True),
    GgufArchitecture(
        "gemma3", "Gemma3ForCausalLM", "gemma3_text", _GEMMA | _HEAD_NORMS, offset_norms=True
    ),
    GgufArchitecture(
        "gemma4",
        "Gemma4ForCausalLM",
        "gemma4_text",
        _GEMMA | _HEAD_NORMS | _GEMMA4,
        top=_TOP | _GEMMA4_TOP,
    ),
    GgufArchitecture(
        "gpt-oss",
        "GptOssForCausalLM",
        "gpt_oss",
        _ATTENTION
        | _EXPERTS
        | {
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
    ),
)
