"""Every launcher under one name, for `launch.kernels_for`."""

from vllm_models.gpu.fp8_matmul import fp8_matmul
from vllm_models.gpu.gate import clamped_swiglu, gelu_mul, silu_mul
from vllm_models.gpu.grouped_matmul import grouped_matmul
from vllm_models.gpu.grouped_rows import dequantize, gather_rows
from vllm_models.gpu.kv_write import kv_write
from vllm_models.gpu.matmul import dense_matmul
from vllm_models.gpu.moe_answers import add_answers
from vllm_models.gpu.moe_matmul import expert_matmul, plan_pairs
from vllm_models.gpu.moe_routing import choose_experts
from vllm_models.gpu.paged_attention import paged_attention
from vllm_models.gpu.rms_norm import add_rms_norm, rms_norm
from vllm_models.gpu.rope_write import rope, rope_write

__all__ = [
    "add_answers",
    "add_rms_norm",
    "choose_experts",
    "clamped_swiglu",
    "dense_matmul",
    "dequantize",
    "expert_matmul",
    "fp8_matmul",
    "gather_rows",
    "gelu_mul",
    "grouped_matmul",
    "kv_write",
    "paged_attention",
    "plan_pairs",
    "rms_norm",
    "rope",
    "rope_write",
    "silu_mul",
]
