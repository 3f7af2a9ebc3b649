"""What the experts of a token have answered, as one row.

    out[t] = weights[t, 0] answers[t * k] + weights[t, 1] answers[t * k + 1] + ...

in the order of the token's choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024


@triton.jit
def _add_kernel(out, answers, weights, num_chosen, width, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < width
    sums = tl.zeros((TILE,), tl.float32)
    for i in range(num_chosen):
        pair = token * num_chosen + i
        answer = tl.load(answers + pair * width + column, mask=there, other=0.0).to(tl.float32)
        sums += answer * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * width + column, sums.to(out.dtype.element_ty), mask=there)


def add_answers(answers: Tensor, weights: Tensor) -> Tensor:
    """Each token's answers by their weights, in float32 and in the order of its choices: [T, M].

    Args:
        answers: [T * k, M], contiguous.
        weights: [T, k], any floats.
    """
    (num_tokens, num_chosen), width = weights.shape, answers.shape[1]
    out = torch.empty((num_tokens, width), dtype=answers.dtype, device=answers.device)
    if num_tokens > 0:
        tile = min(_TILE, triton.next_power_of_2(width))
        _add_kernel[(num_tokens, triton.cdiv(width, tile))](
            out, answers, weights.contiguous(), num_chosen, width, TILE=tile
        )
    return out


def reference(answers: Tensor, weights: Tensor) -> Tensor:
    """`add_answers`."""
    answers = answers.float().unflatten(0, weights.shape) * weights.float()[..., None]
    return answers.sum(1)


def variants() -> tuple[Variant, ...]:
    """For any sizes."""
    signature = {"out": "*bf16", "answers": "*bf16", "weights": "*fp32"}
    signature |= dict.fromkeys(("num_chosen", "width"), "i32")
    return (Variant("moe_matmul-sum", _add_kernel, signature, {"TILE": _TILE}),)
