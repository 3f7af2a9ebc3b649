"""From logits to tokens in one read of the logits, for the rows of a step at once.

    score[v] = logit[v]                                     greedy, temperature 0
    score[v] = logit[v] / temperature - log(noise[v])       else; -inf below the row's threshold
    token    = first v of the largest score

logits [N, V]; a program takes a tile of a row, and a second kernel the best of the tiles. The same
launches serve any mix of rows: what a row needs is read on the device. Inside a tile the race is
run as noise[v] * exp((best logit - logit[v]) / temperature), the smallest first, which saves a
logarithm per token; tiles compare scores.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant
from vllm_models.gpu.noise import exponential, key_of
from vllm_models.gpu.sampling_state import SamplingState, is_cut, steepness
from vllm_models.gpu.truncate import find_thresholds

_TILE = 4096


class Winners(NamedTuple):
    """What was sampled in each row.

    Attributes:
        token_ids: [N] int64, meaningless where the score is not finite.
        scores: [N] float32 that the token won with: -inf if no token is possible, NaN or inf if
            a logit was.
    """

    token_ids: Tensor
    scores: Tensor


@triton.jit
def _tile_kernel(
    best_scores,
    best_ids,
    logits,
    rows,
    positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    thresholds,
    vocab_size,
    stride,
    HAS_THRESHOLDS: tl.constexpr,
    TILE: tl.constexpr,
):
    place, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + place).to(tl.int64)
    temperature = tl.load(temperatures + row)
    token_ids = tile * TILE + tl.arange(0, TILE)
    there = token_ids < vocab_size
    source = logits + place.to(tl.int64) * stride + token_ids
    x = tl.load(source, mask=there, other=-float("inf")).to(tl.float32)
    is_nan = tl.max((x != x).to(tl.int32), axis=0)
    x = tl.where(x != x, -float("inf"), x)
    if HAS_THRESHOLDS:
        is_bounded = is_cut(row, temperatures, top_ks, top_ps, min_ps, vocab_size)
        threshold = tl.load(thresholds + place, mask=is_bounded, other=-float("inf"))
        x = tl.where(x < threshold, -float("inf"), x)
    score, index = tl.max(x, axis=0, return_indices=True)
    if (temperature > 0) & (tl.abs(score) < float("inf")):
        position = tl.load(positions + place)
        key = key_of(tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1), position)
        slowness = tl.exp2(tl.minimum((score - x) * steepness(temperature), 100.0))
        index = tl.argmin(exponential(key, token_ids) * slowness, axis=0)
        token_id = tile * TILE + index
        winner = tl.load(logits + place.to(tl.int64) * stride + token_id).to(tl.float32)
        score = tl.div_rn(winner, temperature) - tl.log(exponential(key, token_id))
    out = place * tl.num_programs(1) + tile
    tl.store(best_scores + out, tl.where(is_nan > 0, float("nan"), score))
    tl.store(best_ids + out, tile * TILE + index)


@triton.jit(do_not_specialize=["num_tiles"])
def _best_kernel(token_ids, scores, best_scores, best_ids, num_tiles, TILES: tl.constexpr):
    place = tl.program_id(0)
    tiles = tl.arange(0, TILES)
    source = place * num_tiles + tiles
    score = tl.load(best_scores + source, mask=tiles < num_tiles, other=-float("inf"))
    is_nan = tl.max((score != score).to(tl.int32), axis=0)
    score = tl.where(score != score, -float("inf"), score)
    best, index = tl.max(score, axis=0, return_indices=True)
    tl.store(scores + place, tl.where(is_nan > 0, float("nan"), best))
    token = tl.load(best_ids + place * num_tiles + index)
    tl.store(token_ids + place, token.to(tl.int64))


def sample(
    logits: Tensor, rows: Tensor, positions: Tensor, state: SamplingState, *, truncated: bool = True
) -> Winners:
    """Sample a token for each row of logits.

    Args:
        logits: [N, V] float32 or bfloat16, each row contiguous.
        rows: [N] int32 of the state.
        positions: [N] int32 of the tokens to be sampled: the number of tokens before each.
        state: How every row samples.
        truncated: False leaves out the launches that find thresholds, for callers who know that no
            row has top-k, top-p or min-p.
    """
    num_rows, vocab_size = logits.shape
    thresholds = find_thresholds(logits, rows, state) if truncated else None
    tile = min(_TILE, triton.next_power_of_2(vocab_size))
    num_tiles = triton.cdiv(vocab_size, tile)
    best_scores = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    best_ids = torch.empty_like(best_scores, dtype=torch.int32)
    _tile_kernel[(num_rows, num_tiles)](
        *(best_scores, best_ids, logits, rows, positions, *state, thresholds),
        *(vocab_size, logits.stride(0)),
        HAS_THRESHOLDS=truncated,
        TILE=tile,
        num_warps=8,
    )
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    scores = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    _best_kernel[(num_rows,)](
        *(token_ids, scores, best_scores, best_ids, num_tiles),
        TILES=triton.next_power_of_2(num_tiles),
        num_warps=1,
    )
    return Winners(token_ids, scores)


def variants() -> tuple[Variant, ...]:
    """For float32 and bfloat16 logits; nothing but the number of tiles depends on the model."""
    state = {
        **dict.fromkeys(("temperatures", "top_ps", "min_ps", "thresholds"), "*fp32"),
        **dict.fromkeys(("rows", "positions", "top_ks", "seeds"), "*i32"),
    }
    best = {"best_scores": "*fp32", "best_ids": "*i32"}
    sizes = dict.fromkeys(("vocab_size", "stride"), "i32")
    constants = {"HAS_THRESHOLDS": True, "TILE": _TILE}
    tiles = tuple(
        Variant(
            f"sample-{dtype}",
            _tile_kernel,
            {"logits": f"*{dtype}", **best, **state, **sizes},
            constants,
            num_warps=8,
        )
        for dtype in ("fp32", "bf16")
    )
    reduced = {"token_ids": "*i64", "scores": "*fp32", **best, "num_tiles": "i32"}
    return (*tiles, *(_best(vocab_size, reduced) for vocab_size in (128256, 151936)))


def _best(vocab_size: int, signature: dict[str, str]) -> Variant:
    num_tiles = triton.cdiv(vocab_size, _TILE)
    constants = {"TILES": triton.next_power_of_2(num_tiles)}
    return Variant(f"sample_best-{vocab_size}", _best_kernel, signature, constants, num_warps=1)
