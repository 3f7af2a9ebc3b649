"""When a completion ends, token by token. Knows nothing of blocks or batches."""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from typing import NamedTuple

from vllm_traits import FinishReason, SamplingParams

from vllm_core.scheduler.sequence import Sequence


class Ending(NamedTuple):
    """Why a sequence is over, and the stop token or the error code that did it."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None


def stop_ids(params: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """Every token that ends a completion."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_token_ids


def ending(seq: Sequence, eos_token_ids: frozenset[int]) -> Ending | None:
    """Why the newest token of a sequence ends it, or None.

    A stop token counts from position `min_tokens` of the completion on; until then the backend
    does not sample one.
    """
    token = seq.tokens[-1]
    params = seq.params
    num_before = len(seq.tokens) - seq.num_prompt - 1
    if token in seq.stop_ids and num_before >= params.min_tokens:
        is_eos = token in eos_token_ids and not params.ignore_eos
        return Ending(FinishReason.STOP, None if is_eos else token)
    if len(seq.tokens) >= seq.max_length:
        return Ending(FinishReason.LENGTH)
    return None


def confirm(
    seq: Sequence, new_tokens: ReadOnly[int], eos_token_ids: frozenset[int]
) -> Ending | None:
    """Append sampled tokens up to the one that ends the sequence; the rest is dropped.

    Raises:
        Exception: Whatever the request's grammar raises.
    """
    grammar = seq.request.grammar
    for token in new_tokens:
        if grammar is not None:
            grammar.accept(token)
        seq.tokens.append(token)
        end = ending(seq, eos_token_ids)
        if end is not None:
            return end
    return None
