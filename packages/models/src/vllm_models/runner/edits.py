"""Changes to logits before sampling: allowed and forbidden tokens, bias, penalties.

What never changes for a sequence is turned into tensors once, when it starts. A sequence without
such parameters has no `Edits` and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from vllm_traits import SamplingParams

if TYPE_CHECKING:
    from vllm_models.runner.rows import Row

_MAX_COUNTS = 1 << 22  # elements of the occurrence counts held at once


class Target(NamedTuple):
    """A token to be sampled.

    Attributes:
        seq_id: Whose it is.
        row: The sequence's row.
        length: Tokens before it, drafts that are being verified included; so also its position.
    """

    seq_id: int
    row: Row
    length: int


@dataclass(frozen=True, slots=True)
class Edits:
    """A sequence's own changes, as tensors.

    Attributes:
        forbidden: [V] True for ids outside `allowed_token_ids`, and for single bad tokens.
        bias_ids: [N] ids with a bias.
        bias_values: [N] what is added.
        bad_prefixes: [N, L] all but the last token of bad sequences, right-aligned, -1 matches all.
        bad_last: [N] their last tokens.
        early_stops: Ids forbidden until `min_tokens` exist.
        min_tokens: See `early_stops`.
        penalised: Whether any penalty is on.
    """

    forbidden: Tensor | None
    bias_ids: Tensor | None
    bias_values: Tensor | None
    bad_prefixes: Tensor | None
    bad_last: Tensor | None
    early_stops: Tensor | None
    min_tokens: int
    penalised: bool


def compile_edits(
    params: SamplingParams, eos: frozenset[int], vocab_size: int, device: torch.device
) -> Edits | None:
    """Turn parameters into tensors; None if they change no logits."""
    stops = sorted(eos | params.stop_token_ids) if params.min_tokens else []
    prefixes, last = _bad_sequences(params)
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1)
    edits = Edits(
        forbidden=_forbidden(params, vocab_size, device),
        bias_ids=_tensor([token for token, _ in params.logit_bias], device),
        bias_values=_tensor([float(value) for _, value in params.logit_bias], device),
        bad_prefixes=_tensor(prefixes, device),
        bad_last=_tensor(last, device),
        early_stops=_tensor(stops, device),
        min_tokens=params.min_tokens,
        penalised=any(penalties),
    )
    tensors = (edits.forbidden, edits.bias_ids, edits.bad_last, edits.early_stops)
    return edits if edits.penalised or any(t is not None for t in tensors) else None


def _tensor(values: Sequence[object], device: torch.device) -> Tensor | None:
    return torch.tensor(values, device=device) if values else None


def _forbidden(params: SamplingParams, vocab_size: int, device: torch.device) -> Tensor | None:
    singles = [sequence[0] for sequence in params.bad_token_ids if len(sequence) == 1]
    if params.allowed_token_ids is None and not singles:
        return None
    forbidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
    if params.allowed_token_ids is not None:
        forbidden[:] = True
        forbidden[list(params.allowed_token_ids)] = False
    forbidden[singles] = True
    return forbidden


def _bad_sequences(params: SamplingParams) -> tuple[list[list[int]], list[int]]:
    longer = [sequence for sequence in params.bad_token_ids if len(sequence) > 1]
    width = max((len(sequence) - 1 for sequence in longer), default=0)
    prefixes = [[-1] * (width - len(s) + 1) + list(s[:-1]) for s in longer]
    return prefixes, [sequence[-1] for sequence in longer]


def apply_edits(
    logits: Tensor, targets: Sequence[Target], tokens: Tensor, masks: Mapping[int, bytes]
) -> None:
    """Change logits [N, V] in place.

    Args:
        logits: One row per target.
        targets: What is being sampled.
        tokens: [rows, capacity] every sequence's tokens.
        masks: Allowed ids of some sequences, as bits.
    """
    penalised: list[int] = []
    for index, target in enumerate(targets):
        edits = target.row.edits
        if edits is not None:
            _apply_own(logits[index], target, edits, tokens)
            if edits.penalised:
                penalised.append(index)
        if target.seq_id in masks:
            logits[index].masked_fill_(~unpack_mask(masks[target.seq_id], logits), -torch.inf)
    size = max(1, _MAX_COUNTS // logits.shape[1])
    for first in range(0, len(penalised), size):
        _penalise(logits, penalised[first : first + size], targets, tokens)


def _apply_own(logits: Tensor, target: Target, edits: Edits, tokens: Tensor) -> None:
    if edits.forbidden is not None:
        logits.masked_fill_(edits.forbidden, -torch.inf)
    if edits.bad_prefixes is not None:
        _forbid_bad(logits, target, edits, tokens)
    if edits.early_stops is not None:
        generated = target.length - target.row.num_prompt_tokens
        if generated < edits.min_tokens:
            logits[edits.early_stops] = -torch.inf
    if edits.bias_ids is not None:
        logits.index_add_(0, edits.bias_ids, edits.bias_values)


def _forbid_bad(logits: Tensor, target: Target, edits: Edits, tokens: Tensor) -> None:
    """Forbid the last token of every bad sequence whose beginning stands at the end of the text."""
    width = edits.bad_prefixes.shape[1]
    recent = tokens[target.row.index, max(0, target.length - width) : target.length]
    recent = torch.nn.functional.pad(recent, (width - len(recent), 0), value=-2)
    match = ((edits.bad_prefixes == recent) | (edits.bad_prefixes < 0)).all(dim=1)
    limit = torch.where(match, -torch.inf, torch.inf)
    logits.scatter_reduce_(0, edits.bad_last, limit, "amin")


def unpack_mask(mask: bytes, logits: Tensor) -> Tensor:
    """Bits, least significant first, as booleans [V]; ids past the end are False."""
    vocab_size = logits.shape[-1]
    packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8).to(logits.device)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1
    allowed = torch.zeros(vocab_size, dtype=torch.bool, device=logits.device)
    flat = bits.flatten()[:vocab_size]
    allowed[: len(flat)] = flat.bool()
    return allowed


def _penalise(
    logits: Tensor, indices: list[int], targets: Sequence[Target], tokens: Tensor
) -> None:
    """Repetition penalty over prompt and completion, then frequency and presence of completion."""
    device = logits.device
    rows = [targets[index].row for index in indices]
    params = torch.tensor(
        [_penalties(row) for row in rows], dtype=torch.float32, device=device
    )  # [n, 3]
    bounds = torch.tensor(
        [
            (row.index, row.num_prompt_tokens, targets[i].length)
            for row, i in zip(rows, indices, strict=True)
        ],
        device=device,
    )
    place = torch.tensor(indices, device=device)
    longest = max(targets[index].length for index in indices)
    history = tokens[bounds[:, 0], :longest]  # [n, L]
    position = torch.arange(longest, device=device)
    known = position < bounds[:, 2:]
    completion = known & (position >= bounds[:, 1:2])
    edited = logits[place]
    seen = torch.zeros_like(edited).scatter_add_(1, history, known.float()) > 0
    factor = torch.where(edited > 0, 1 / params[:, :1], params[:, :1])
    edited = torch.where(seen, edited * factor, edited)
    counts = torch.zeros_like(edited).scatter_add_(1, history, completion.float())
    edited -= counts * params[:, 1:2] + (counts > 0) * params[:, 2:]
    logits[place] = edited


def _penalties(row: Row) -> tuple[float, float, float]:
    params = row.params
    assert isinstance(params, SamplingParams)
    return params.repetition_penalty, params.frequency_penalty, params.presence_penalty
