"""Which experts a token uses, and who goes to each expert.

    choose   logits [T, E] -> experts and their weights [T, k], best first:
             score = softmax(logit) or sigmoid(logit), choice by logit or by score + correction
    sort     experts [T, k] -> places: pairs of a token and a choice, pair = token * k + choice,
             sorted by expert and within one by pair; each expert's begin with a whole block

How many blocks are used is known to the device alone; memory is for as many as there could be.
Places that pad a block hold the number of pairs. No order depends on which program was faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024  # pairs that are looked through at once


@triton.jit
def _choose_kernel(
    weights,
    chosen,
    logits,
    correction,
    num_experts,
    num_chosen,
    stride,
    scale,
    IS_SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, EXPERTS), tl.arange(0, CHOSEN)
    there = expert < num_experts
    logit = tl.load(logits + token * stride + expert, mask=there, other=float("-inf"))
    choice = logit.to(tl.float32)
    if IS_SIGMOID:
        scores = tl.sigmoid(choice)
        choice = scores
        if correction is not None:
            choice += tl.load(correction + expert, mask=there, other=0.0).to(tl.float32)
    else:
        scores = tl.exp(choice - tl.max(choice, 0))
        scores = scores / tl.sum(scores, 0)
    choice = tl.where(there, choice, float("-inf"))
    best = tl.zeros((CHOSEN,), tl.int32)
    found = tl.zeros((CHOSEN,), tl.float32)
    for i in range(num_chosen):
        index = tl.minimum(tl.argmax(choice, 0), num_experts - 1)  # of NaNs any could be given
        best = tl.where(place == i, index, best)
        found = tl.where(place == i, tl.sum(tl.where(expert == index, scores, 0.0), 0), found)
        choice = tl.where(expert == index, float("-inf"), choice)
    if RENORMALIZE:
        found = found / tl.maximum(tl.sum(found, 0), 1e-20)
    is_place = place < num_chosen
    tl.store(weights + token * num_chosen + place, found * scale, mask=is_place)
    tl.store(chosen + token * num_chosen + place, best, mask=is_place)


def choose_experts(
    logits: Tensor,
    num_chosen: int,
    renormalize: bool,
    scale: float = 1.0,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights float32 and experts int32, [T, num_chosen] each; ties go to the first expert.

    Args:
        logits: [T, E], any floats.
        num_chosen: At most E.
        renormalize: Scale the weights of a token to a sum of 1.
        scale: Multiplies the weights in the end.
        correction: [E] added to scores for the choice alone; scores are then sigmoids.
    """
    num_tokens, num_experts = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(num_tokens, num_chosen, dtype=torch.int32, device=logits.device)
    if num_tokens > 0:
        experts = triton.next_power_of_2(num_experts)
        _choose_kernel[(num_tokens,)](
            *(weights, chosen, logits, correction, num_experts, num_chosen, logits.stride(0)),
            float(scale),
            IS_SIGMOID=correction is not None,
            RENORMALIZE=renormalize,
            EXPERTS=experts,
            CHOSEN=triton.next_power_of_2(num_chosen),
            num_warps=1 if experts <= 256 else 4,
        )
    return weights, chosen


class Places(NamedTuple):
    """Pairs in the order of their experts.

    Attributes:
        pairs: int32 [blocks * block_size]; T * k is nobody.
        experts: int32 [blocks], whose a block is.
        num_blocks: int32 [1] that are used; what stands behind them means nothing.
        block_size: Places of a block.
    """

    pairs: Tensor
    experts: Tensor
    num_blocks: Tensor
    block_size: int


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(counts, chosen, num_pairs, TILE: tl.constexpr):
    expert = tl.program_id(0)
    found = tl.zeros((TILE,), tl.int32)
    for first in range(0, num_pairs, TILE):
        pair = first + tl.arange(0, TILE)
        own = tl.load(chosen + pair, mask=pair < num_pairs, other=-1)
        found += (own == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    pairs,
    block_experts,
    num_blocks,
    counts,
    chosen,
    num_pairs,
    num_experts,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    expert = tl.program_id(0)
    others = tl.arange(0, EXPERTS)
    count = tl.load(counts + others, mask=others < num_experts, other=0)
    blocks = (count + BLOCK - 1) // BLOCK
    first_block = tl.sum(tl.where(others < expert, blocks, 0), 0)
    own_blocks = tl.sum(tl.where(others == expert, blocks, 0), 0)
    if expert == 0:
        tl.store(num_blocks, tl.sum(blocks, 0))
    for i in range(own_blocks):
        tl.store(block_experts + first_block + i, expert)
    place = first_block * BLOCK
    if own_blocks > 0:
        for first in range(0, num_pairs, TILE):
            pair = first + tl.arange(0, TILE)
            own = tl.load(chosen + pair, mask=pair < num_pairs, other=-1) == expert
            rank = tl.cumsum(own.to(tl.int32), 0)
            tl.store(pairs + place + rank - 1, pair, mask=own)
            place += tl.sum(own.to(tl.int32), 0)
        padding = place + tl.arange(0, BLOCK)
        is_padding = padding < (first_block + own_blocks) * BLOCK
        tl.store(pairs + padding, tl.zeros((BLOCK,), tl.int32) + num_pairs, mask=is_padding)


def sort_pairs(chosen: Tensor, num_experts: int, block_size: int) -> Places:
    """Sort by expert.

    Args:
        chosen: [T, k] int32 or int64, contiguous, with at least one token; all below num_experts,
            and nobody's if below 0.
        num_experts: At most a few hundred.
        block_size: A power of two.
    """
    num_pairs, device = chosen.numel(), chosen.device
    most = num_pairs + min(num_pairs, num_experts) * (block_size - 1)
    blocks = triton.cdiv(most, block_size)
    found = Places(
        torch.empty(blocks * block_size, dtype=torch.int32, device=device),
        torch.empty(blocks, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        block_size,
    )
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    tile = min(_TILE, max(16, triton.next_power_of_2(num_pairs)))
    _count_kernel[(num_experts,)](counts, chosen, num_pairs, TILE=tile)
    _sort_kernel[(num_experts,)](
        *(found.pairs, found.experts, found.num_blocks, counts, chosen, num_pairs, num_experts),
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK=block_size,
        TILE=tile,
    )
    return found


def reference(
    logits: Tensor,
    num_chosen: int,
    renormalize: bool,
    scale: float = 1.0,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`choose_experts`."""
    scores = logits.float().softmax(-1) if correction is None else logits.float().sigmoid()
    choice = logits.float() if correction is None else scores + correction
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :num_chosen]
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return weights * scale, chosen.int()


def reference_places(chosen: Tensor, num_experts: int, block_size: int) -> Places:
    """`sort_pairs`, with no more than the blocks that are used."""
    flat = chosen.flatten().tolist()
    pairs: list[int] = []
    experts: list[int] = []
    for expert in range(num_experts):
        own = [pair for pair, found in enumerate(flat) if found == expert]
        own += [len(flat)] * (-len(own) % block_size)
        pairs += own
        experts += [expert] * (len(own) // block_size)
    found = (torch.tensor(numbers, dtype=torch.int32) for numbers in (pairs, experts))
    return Places(*found, torch.tensor([len(experts)], dtype=torch.int32), block_size)


def variants() -> tuple[Variant, ...]:
    """Experts as of Qwen3-30B-A3B, Mixtral-8x7B and DeepSeek-V3."""
    found: list[Variant] = []
    pointers = {"weights": "*fp32", "chosen": "*i32", "logits": "*bf16", "correction": "*fp32"}
    sizes = {**dict.fromkeys(("num_experts", "num_chosen", "stride"), "i32"), "scale": "fp32"}
    for num_experts, num_chosen, is_sigmoid in ((128, 8, False), (8, 2, False), (256, 8, True)):
        constants = {"IS_SIGMOID": is_sigmoid, "RENORMALIZE": True}
        constants |= {"EXPERTS": num_experts, "CHOSEN": num_chosen}
        signature = pointers | sizes
        if not is_sigmoid:
            del signature["correction"]
            constants["correction"] = None
        name = f"moe_routing-choose-{num_experts}"
        found.append(Variant(name, _choose_kernel, signature, constants, num_warps=1))
        sort = dict.fromkeys(("pairs", "block_experts", "num_blocks", "counts", "chosen"), "*i32")
        sort |= dict.fromkeys(("num_pairs", "num_experts"), "i32")
        tiles = {"EXPERTS": num_experts, "BLOCK": 64, "TILE": _TILE}
        found.append(Variant(f"moe_routing-sort-{num_experts}", _sort_kernel, sort, tiles))
    count = {"counts": "*i32", "chosen": "*i32", "num_pairs": "i32"}
    found.append(Variant("moe_routing-count", _count_kernel, count, {"TILE": _TILE}))
    return tuple(found)
