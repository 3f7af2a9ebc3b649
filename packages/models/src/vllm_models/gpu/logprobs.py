"""Log-probabilities of tokens that stand somewhere, with their rank and the most likely ones.

    logprob[i] = logits[i, t] - log sum_v exp(logits[i, v])       t = token_ids[i]
    rank[i]    = 1 + number of v with logits[i, v] > logits[i, t]

logits [n, V]; one read for both by a program per tile, then one program per row. Nothing comes to
the host. Ranks compare logits, which tell apart what the subtraction may round to one value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 4096


@triton.jit
def _tile_kernel(bests, totals, larger, logits, token_ids, vocab_size, stride, TILE: tl.constexpr):
    place, tile = tl.program_id(0), tl.program_id(1)
    row = logits + place.to(tl.int64) * stride
    chosen = tl.load(row + tl.load(token_ids + place)).to(tl.float32)
    index = tile * TILE + tl.arange(0, TILE)
    x = tl.load(row + index, mask=index < vocab_size, other=-float("inf")).to(tl.float32)
    best = tl.max(x, axis=0)
    shift = tl.where(tl.abs(best) < float("inf"), best, 0.0)
    out = place * tl.num_programs(1) + tile
    tl.store(bests + out, best)
    tl.store(totals + out, tl.sum(tl.exp(x - shift), axis=0))
    tl.store(larger + out, tl.sum((x > chosen).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["num_tiles"])
def _row_kernel(
    logprobs,
    ranks,
    normalisers,
    bests,
    totals,
    larger,
    logits,
    token_ids,
    num_tiles,
    stride,
    TILES: tl.constexpr,
):
    place = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    there = tiles < num_tiles
    source = place * num_tiles + tiles
    tile_bests = tl.load(bests + source, mask=there, other=-float("inf"))
    best = tl.max(tile_bests, axis=0)
    shift = tl.where(tl.abs(best) < float("inf"), best, 0.0)
    shifts = tl.where(tl.abs(tile_bests) < float("inf"), tile_bests, 0.0)
    tile_totals = tl.load(totals + source, mask=there, other=0.0)
    shares = tl.where(tile_totals > 0, tl.exp(shifts - shift), 0.0)
    normaliser = shift + tl.log(tl.sum(tile_totals * shares, axis=0))
    chosen = tl.load(logits + place.to(tl.int64) * stride + tl.load(token_ids + place))
    tl.store(normalisers + place, normaliser)
    tl.store(logprobs + place, chosen.to(tl.float32) - normaliser)
    rank = tl.sum(tl.load(larger + source, mask=there, other=0), axis=0) + 1
    tl.store(ranks + place, rank.to(tl.int64))


def score(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is to be reported, on the device.

    Args:
        logits: [n, V] of the model before any change, float32 or bfloat16, each row contiguous.
        token_ids: [n] int64 the token that stands there.
        num_top: How many of the most likely tokens to list, W at most.

    Returns:
        Log-probabilities [n] and ranks [n] of the tokens, and ids [n, W] and log-probabilities
        [n, W] of the most likely ones, best first.
    """
    num_rows, vocab_size = logits.shape
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    num_tiles = triton.cdiv(vocab_size, tile)
    bests = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    totals, larger = torch.empty_like(bests), torch.empty_like(bests, dtype=torch.int32)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    normalisers, ranks = torch.empty_like(logprobs), torch.empty_like(token_ids)
    _tile_kernel[(num_rows, num_tiles)](
        *(bests, totals, larger, logits, token_ids, vocab_size, logits.stride(0)),
        TILE=tile,
        num_warps=8,
    )
    _row_kernel[(num_rows,)](
        *(logprobs, ranks, normalisers, bests, totals, larger, logits, token_ids),
        *(num_tiles, logits.stride(0)),
        TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
    )
    values, ids = logits.topk(min(num_top, vocab_size))
    return logprobs, ranks, ids, values.float() - normalisers[:, None]


def reference(
    logits: Tensor, token_ids: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`score` in plain torch."""
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    larger = logits > logits.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(min(num_top, logits.shape[1]))
    return chosen[:, 0], larger.sum(-1) + 1, ids, values


def variants() -> tuple[Variant, ...]:
    """For both vocabularies and types of logits."""
    tiles = {"bests": "*fp32", "totals": "*fp32", "larger": "*i32"}
    shared = {"token_ids": "*i64", "stride": "i32"}
    rows = {"logprobs": "*fp32", "ranks": "*i64", "normalisers": "*fp32", "num_tiles": "i32"}
    of_tiles = tuple(
        Variant(
            f"logprobs_tile-{dtype}",
            _tile_kernel,
            {"logits": f"*{dtype}", **tiles, **shared, "vocab_size": "i32"},
            {"TILE": _TILE},
            num_warps=8,
        )
        for dtype in ("fp32", "bf16")
    )
    of_rows = tuple(
        Variant(
            f"logprobs_row-{vocab_size}-{dtype}",
            _row_kernel,
            {"logits": f"*{dtype}", **tiles, **shared, **rows},
            {"TILES": triton.next_power_of_2(triton.cdiv(vocab_size, _TILE))},
            num_warps=1,
        )
        for vocab_size in (128256, 151936)
        for dtype in ("fp32", "bf16")
    )
    return of_tiles + of_rows
