"""Products of a mixture of experts: each pair of a token and a choice by the weight of its expert.

    x [T, K] or [P, K], weights [E, N, K], bias [E, N] -> y [P, N],  P = T * k pairs
    y[p] = x[p // (P / rows of x)] W[expert of p]^T + bias[expert of p]

Weights are plain or the planes of `layout.Planes`, all experts' behind one another. Few pairs are
computed one by one, more of them in blocks that share an expert (`moe_routing.sort_pairs`); grids
are for the most blocks there could be, and those that are not used end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.layout import Layout
from vllm_models.gpu.moe_columns import order_columns
from vllm_models.gpu.moe_kernels import blocks_kernel, pair_kernel
from vllm_models.gpu.moe_routing import Places, sort_pairs
from vllm_models.gpu.stacked import StackedExperts

_FEW_PAIRS = 64
_BLOCK_K = 64  # of tiles
_PAIR_N, _PAIR_K = 16, 256  # of one pair


class Form(NamedTuple):
    """How products are cut into programs.

    Attributes:
        block_m: Pairs that share an expert.
        block_n: Rows of a weight.
        num_warps: Of a program.
    """

    block_m: int
    block_n: int
    num_warps: int = 4


FIXED = Form(64, 64)
_FORMS = (Form(16, 64), Form(32, 64), FIXED, Form(128, 128, num_warps=8))


def form_for(
    num_pairs: int, num_experts: int, dtype: torch.dtype, fixed_order: bool
) -> Form | None:
    """The form of a product; None is pair by pair.

    Args:
        num_pairs: Of tokens and their choices.
        num_experts: How many there are.
        dtype: Of x; large tiles of float32 have no room.
        fixed_order: The order of sums may not depend on the number of pairs.
    """
    if fixed_order:
        return FIXED
    if num_pairs <= _FEW_PAIRS:
        return None
    forms = _FORMS if dtype.itemsize == 2 else _FORMS[:-1]
    return next((form for form in forms if num_pairs <= form.block_m * num_experts), forms[-1])


def _num_stages(layout: Layout | None, dtype: torch.dtype) -> int:
    """Loads in flight: as many as there is room for."""
    return 3 if layout is None and dtype.itemsize == 2 else 2


class Plan(NamedTuple):
    """How the pairs of one step are computed; the same for both layers of the experts.

    Attributes:
        chosen: [T, k] int32 or int64, contiguous.
        form: None is pair by pair.
        places: Where there is a form.
    """

    chosen: Tensor
    form: Form | None
    places: Places | None


def plan_pairs(
    chosen: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    fixed_order: bool = False,
    is_partial: bool = False,
) -> Plan:
    """Sort the pairs by expert if there are many.

    Args:
        chosen: [T, k] int32 or int64 below num_experts.
        num_experts: How many there are.
        dtype: Of x.
        fixed_order: A token's result does not depend on the other tokens, nor on how many there
            are.
        is_partial: Experts may be below 0, whose pairs are left out.
    """
    chosen = chosen.contiguous()
    form = form_for(chosen.numel(), num_experts, dtype, fixed_order)
    if form is None and is_partial:
        form = _FORMS[0]
    is_sorted = form is not None and chosen.numel() > 0
    places = sort_pairs(chosen, num_experts, form.block_m) if form and is_sorted else None
    return Plan(chosen, form, places)


def expert_matmul(
    x: Tensor,
    weights: Sequence[StackedExperts],
    plan: Plan,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows of x by the transposed weight of their expert, in x's element type: [T * k, N].

    Args:
        x: [T, K] of which each row is used by k pairs, or [T * k, K]; contiguous rows.
        weights: Of neighbouring rows of the layer, from its first to its last.
        plan: Which expert computes which pair.
        bias: [E, N], any floats.
        out: [T * k, N] to write to; pairs that are left out stay as they are.
    """
    x = x.contiguous()
    num_pairs = plan.chosen.numel()
    num_rows = weights[-1].first + weights[-1].rows
    if out is None:
        out = torch.empty((num_pairs, num_rows), dtype=x.dtype, device=x.device)
    for some in weights if num_pairs else ():
        own_x = x if some.orders is None else order_columns(x, plan.chosen, some.orders)
        own_bias = None if bias is None else bias[:, some.first : some.first + some.rows]
        _launch(out[:, some.first :], own_x, some, plan, own_bias)
    return out


def _launch(out: Tensor, x: Tensor, some: StackedExperts, plan: Plan, bias: Tensor | None) -> None:
    num_pairs = plan.chosen.numel()
    bias_stride = 0 if bias is None else bias.stride(0)
    sizes = (num_pairs // len(x), some.rows, some.columns, bias_stride, out.stride(0))
    if plan.form is None or plan.places is None:
        pair_kernel[(triton.cdiv(some.rows, _PAIR_N), num_pairs)](
            *(out, x, plan.chosen, bias, *some.tensors, *sizes),
            LAYOUT=some.layout,
            BLOCK_N=_PAIR_N,
            BLOCK_K=_PAIR_K,
        )
        return
    form, places = plan.form, plan.places
    blocks_kernel[(triton.cdiv(some.rows, form.block_n), len(places.experts))](
        *(out, x, places.pairs, places.experts, places.num_blocks, bias, *some.tensors),
        *(num_pairs, *sizes),
        LAYOUT=some.layout,
        BLOCK_M=form.block_m,
        BLOCK_N=form.block_n,
        BLOCK_K=_BLOCK_K,
        num_warps=form.num_warps,
        num_stages=_num_stages(some.layout, x.dtype),
    )


def reference(x: Tensor, weight: Tensor, chosen: Tensor, bias: Tensor | None = None) -> Tensor:
    """`expert_matmul` of numbers [E, N, K], in float32."""
    experts = chosen.flatten().long()
    rows = x.float().repeat_interleave(len(experts) // len(x), 0)
    found = torch.einsum("pk,pnk->pn", rows, weight.float()[experts])
    return (found if bias is None else found + bias.float()[experts]).to(x.dtype)


_PLANES = ("high", "scales", "offsets", "factors", "offset_factors", "table")
_STRIDES = ("low", "high", "scales", "offsets", "factors", "offset_factors")
_KINDS: dict[str, tuple[Layout | None, dict[str, str]]] = {
    "bf16": (None, {"low": "*bf16"}),
    "4 bit": (Layout("integer", 4, 0, 128, 32, 8), {"low": "*i32", "scales": "*fp16"}),
    "mxfp4": (
        Layout("e2m1", 4, 0, 32, 32, scale="exponent"),
        {"low": "*i32", "scales": "*u8"},
    ),
    "q4_k": (
        Layout("integer", 4, 0, 32, 32, 0, "step", "step"),
        {
            **{"low": "*i32", "scales": "*u8", "offsets": "*u8"},
            **dict.fromkeys(("factors", "offset_factors"), "*fp16"),
        },
    ),
}


def variants() -> tuple[Variant, ...]:
    """One pair and blocks of every size; kernels are the same for Qwen3-30B-A3B and Mixtral."""
    found: list[Variant] = []
    for kind, (layout, tensors) in _KINDS.items():
        absent = {name: None for name in (*_PLANES, "bias") if name not in tensors}
        sizes = ("pairs_per_row", "num_rows", "columns", "bias_stride", "out_stride")
        signature = {"out": "*bf16", "x": "*bf16", **tensors}
        signature |= {f"{name}_stride": "i32" for name in _STRIDES}
        signature |= dict.fromkeys(sizes, "i32")
        constants = {"LAYOUT": layout, **absent}
        pair = {**constants, "BLOCK_N": _PAIR_N, "BLOCK_K": _PAIR_K}
        name = kind.replace(" ", "-")
        of_pair = {**signature, "chosen": "*i32"}
        found.append(Variant(f"moe_matmul-{name}-pair", pair_kernel, of_pair, pair))
        of_blocks = {**signature, "num_pairs": "i32"}
        of_blocks |= dict.fromkeys(("pairs", "block_experts", "num_blocks"), "*i32")
        for form in _FORMS:
            blocks = {"BLOCK_M": form.block_m, "BLOCK_N": form.block_n, "BLOCK_K": _BLOCK_K}
            found.append(
                Variant(
                    f"moe_matmul-{name}-{form.block_m}",
                    *(blocks_kernel, of_blocks, constants | blocks),
                    *(form.num_warps, _num_stages(layout, torch.bfloat16)),
                )
            )
    return tuple(found)
