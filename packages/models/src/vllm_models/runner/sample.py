"""From logits to tokens, for all sequences of a step at once.

Greedy rows take the largest logit. The others run an exponential race: token i of probability p_i
arrives at time E_i / p_i with E_i exponential, and the first one wins with probability p_i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from vllm_traits import SamplingParams, TokenLogprobs

from vllm_models.native.choose import GREEDY, Draw, choose
from vllm_models.native.library import library_for
from vllm_models.runner import noise
from vllm_models.runner.edits import Target, apply_edits
from vllm_models.runner.logprobs import describe
from vllm_models.runner.truncate import truncate

NON_FINITE = "non_finite_logits"
NOTHING_ALLOWED = "no_allowed_token"


class Sampled(NamedTuple):
    """One entry per target.

    Attributes:
        token_ids: What was sampled; meaningless where `failures` has a code.
        failures: Error code by place.
        logprobs: By place, for those who asked.
    """

    token_ids: list[int]
    failures: dict[int, str]
    logprobs: dict[int, TokenLogprobs]


def sample(
    logits: Tensor, targets: Sequence[Target], tokens: Tensor, masks: Mapping[int, bytes]
) -> Sampled:
    """Sample one token per target.

    Args:
        logits: [N, V] float32; changed in place.
        targets: What is sampled in each row.
        tokens: [rows, capacity] every sequence's tokens.
        masks: Allowed ids of some sequences, as bits.
    """
    params = [_sampling(target) for target in targets]
    asked = [i for i, p in enumerate(params) if p.logprobs is not None]
    reported = logits[asked].log_softmax(-1) if asked else None
    apply_edits(logits, targets, tokens, masks)
    best, ids = _draw(logits, targets, params)
    failures = {i: code_of(score) for i, score in enumerate(best) if not isfinite(score)}
    logprobs: dict[int, TokenLogprobs] = {}
    if reported is not None:
        num_top = [params[i].logprobs or 0 for i in asked]
        entries = describe(reported, [ids[i] for i in asked], num_top)
        logprobs = dict(zip(asked, entries, strict=True))
    return Sampled(ids, failures, logprobs)


def _sampling(target: Target) -> SamplingParams:
    assert isinstance(target.row.params, SamplingParams)
    return target.row.params


def code_of(best: float) -> str:
    """What a winning score says about its row; empty if all is well."""
    if best == -float("inf"):
        return NOTHING_ALLOWED
    return "" if abs(best) < float("inf") else NON_FINITE


def _draw(
    logits: Tensor, targets: Sequence[Target], params: Sequence[SamplingParams]
) -> tuple[list[float], list[int]]:
    """Winning score and token of every row."""
    library = library_for(logits)
    if library is not None:
        return choose(library, logits, list(map(_how, targets, params)))
    best, token_ids = logits.max(-1)
    race = [i for i, p in enumerate(params) if p.temperature > 0]
    if race:
        place = torch.tensor(race, device=logits.device)
        winners = _race(logits[place], [targets[i] for i in race], [params[i] for i in race])
        best = best.index_copy(0, place, winners[0])
        token_ids = token_ids.index_copy(0, place, winners[1])
    return best.tolist(), token_ids.tolist()


def _how(target: Target, p: SamplingParams) -> Draw:
    if p.temperature == 0:
        return GREEDY
    key = noise.key(target.row.seed, target.length)
    return Draw(p.temperature, p.top_p, p.min_p, key, p.top_k)


def _is_cut(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _race(
    logits: Tensor, targets: Sequence[Target], params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    keys = noise.keys(((t.row.seed, t.length) for t in targets), logits.device)
    scaled = logits / _column([p.temperature for p in params], logits)[:, None]
    cut = [i for i, p in enumerate(params) if _is_cut(p)]
    if len(cut) == len(params):
        return _race_cut(scaled, keys, params)
    everyone = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)[None]
    if not cut:
        return tuple((scaled - noise.exponential(keys, everyone).log_()).max(-1))
    open_ = sorted(set(range(len(params))) - set(cut))
    best, token_ids = scaled.new_empty(len(params)), keys.new_empty(len(params), dtype=torch.int64)
    for places, is_cut in ((cut, True), (open_, False)):
        place = torch.tensor(places, device=logits.device)
        if is_cut:
            winners = _race_cut(scaled[place], keys[place], [params[i] for i in places])
        else:
            times = noise.exponential(keys[place], everyone)
            winners = (scaled[place] - times.log_()).max(-1)
        best[place], token_ids[place] = winners
    return best, token_ids


def _race_cut(
    scaled: Tensor, keys: Tensor, params: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    values, token_ids = truncate(
        scaled,
        torch.tensor([p.top_k for p in params], device=scaled.device),
        _column([p.top_p for p in params], scaled),
        _column([p.min_p for p in params], scaled),
    )
    times = noise.exponential(keys, token_ids.to(torch.int32))
    best, place = (values - times.log_()).max(-1)
    return best, token_ids.gather(1, place[:, None])[:, 0]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)
