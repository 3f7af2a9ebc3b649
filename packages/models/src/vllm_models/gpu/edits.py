"""Changes to logits before sampling, for all rows of a step: see `SamplingParams` for their order.

What never changes for a sequence is compiled once, when it starts (`compile_row`); what never
changes while the same sequences run lies on the device in an `EditBatch`. A step then uploads
nothing but grammar masks. How far a text has come is known on the device alone, so whatever depends
on it is decided there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm_traits import SamplingParams

from vllm_models.gpu.edit_kernels import (
    Bans,
    Biases,
    Bits,
    Penalised,
    add_biases,
    forbid,
    keep_allowed,
    penalise,
)

_ALWAYS = (1 << 31) - 1  # completions are never as long
_COUNTED_ROWS = 32  # whose occurrence counts are held at once


class Ban(NamedTuple):
    """A token that is forbidden under a condition.

    Attributes:
        token_id: What is forbidden...
        until: ...while the completion is shorter than this...
        after: ...and the text ends with these tokens.
    """

    token_id: int
    until: int
    after: tuple[int, ...]


class Penalties(NamedTuple):
    """As in `SamplingParams`."""

    repetition: float
    frequency: float
    presence: float


@dataclass(frozen=True, slots=True, eq=False)
class RowEdits:
    """A sequence's own changes; equal to itself alone, so a key of what a batch was made from.

    Attributes:
        allowed: Bits of `allowed_token_ids`, [ceil(V / 32)] int32 on the device.
        bias: Token ids, each once, with what is added.
        bans: See `Ban`.
        penalties: None if all are off.
        vocab_size: V.
        device: Where the logits are.
    """

    allowed: Tensor | None
    bias: tuple[tuple[int, float], ...]
    bans: tuple[Ban, ...]
    penalties: Penalties | None
    vocab_size: int
    device: torch.device


def compile_row(
    params: SamplingParams, eos: frozenset[int], vocab_size: int, device: torch.device
) -> RowEdits | None:
    """Prepare a sequence's changes; None if it has none."""
    allowed = None
    if params.allowed_token_ids is not None:
        bits = np.zeros(vocab_size, dtype=bool)
        bits[list(params.allowed_token_ids)] = True
        mask = np.packbits(bits, bitorder="little").tobytes()
        allowed = _sent(_words([mask], vocab_size), device)[0]
    bias: dict[int, float] = {}
    for token_id, value in params.logit_bias:
        bias[token_id] = bias.get(token_id, 0.0) + value
    stops = sorted(eos | params.stop_token_ids) if params.min_tokens else []
    bans = [Ban(token_id, params.min_tokens, ()) for token_id in stops]
    bans += [Ban(ids[-1], _ALWAYS, ids[:-1]) for ids in params.bad_token_ids]
    penalties = Penalties(
        params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    )
    is_penalised = penalties != Penalties(1, 0, 0)
    if allowed is None and not bias and not bans and not is_penalised:
        return None
    return RowEdits(
        allowed,
        tuple(bias.items()),
        tuple(bans),
        penalties if is_penalised else None,
        vocab_size,
        device,
    )


@dataclass(frozen=True, slots=True)
class EditBatch:
    """The changes of all rows of a step, on the device; valid while the rows are the same.

    Attributes:
        allowed: See `Bits`.
        biases: See `Biases`.
        bans: See `Bans`.
        penalised: See `Penalised`.
    """

    allowed: Bits | None
    biases: Biases | None
    bans: Bans | None
    penalised: Penalised | None

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, RowEdits]]) -> EditBatch | None:
        """Bring together what some rows want; None if there are none.

        Args:
            entries: Row of logits, row of the state, and changes of each row that has any.
        """
        if not entries:
            return None
        own = [(place, edits) for place, _, edits in entries]
        return cls(_allowed(own), _biases(own), _bans(own), _penalised(own))


_Own = Sequence[tuple[int, RowEdits]]


def _allowed(own: _Own) -> Bits | None:
    device = own[0][1].device
    found = [(place, edits.allowed) for place, edits in own if edits.allowed is not None]
    if not found:
        return None
    places = np.array([place for place, _ in found], dtype=np.int32)
    return Bits(_sent(places, device), torch.stack([words for _, words in found]))


def _biases(own: _Own) -> Biases | None:
    device = own[0][1].device
    found = [(place, *pair) for place, edits in own for pair in edits.bias]
    if not found:
        return None
    where = np.array([entry[:2] for entry in found], dtype=np.int32)
    values = np.array([entry[2] for entry in found], dtype=np.float32)
    return Biases(_sent(where, device), _sent(values, device))


def _bans(own: _Own) -> Bans | None:
    device = own[0][1].device
    table: list[tuple[int, int, int, int, int]] = []
    after: list[int] = []
    for place, edits in own:
        for ban in edits.bans:
            table.append((place, ban.token_id, ban.until, len(after), len(ban.after)))
            after.extend(ban.after)
    if not table:
        return None
    longest = max(entry[-1] for entry in table)
    sent = _sent(np.array(table, dtype=np.int32), device)
    return Bans(sent, _sent(np.array(after or [0], dtype=np.int32), device), longest)


def _penalised(own: _Own) -> Penalised | None:
    device = own[0][1].device
    found = [(place, edits.penalties) for place, edits in own if edits.penalties is not None]
    if not found:
        return None
    places = np.array([place for place, _ in found], dtype=np.int32)
    values = np.array([penalties for _, penalties in found], dtype=np.float32)
    size = min(len(found), _COUNTED_ROWS)
    counts = torch.zeros(size, own[0][1].vocab_size, dtype=torch.int32, device=device)
    return Penalised(_sent(places, device), _sent(values, device), counts)


def _sent(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    host = torch.from_numpy(values)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _words(masks: Sequence[bytes], vocab_size: int) -> np.ndarray:
    """Masks [n, ceil(V / 32)] int32; ids past the end of a mask are forbidden."""
    width = -(-vocab_size // 32)
    words = np.zeros((len(masks), width * 4), dtype=np.uint8)
    for row, mask in zip(words, masks, strict=True):
        known = mask[: width * 4]
        row[: len(known)] = np.frombuffer(known, dtype=np.uint8)
    return words.view("<i4")


def apply(
    logits: Tensor,
    batch: EditBatch | None,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    num_prompt_tokens: Tensor,
    masks: Mapping[int, bytes],
) -> None:
    """Change logits in place.

    Args:
        logits: [N, V] float32 or bfloat16, each row contiguous; bfloat16 rounds what is added.
        batch: Changes of the rows that have any.
        rows: [N] int32 of the state.
        positions: [N] int32 number of tokens before the one to be sampled, drafts included.
        tokens: [R + 1, C] int32.
        num_prompt_tokens: [R + 1] int32.
        masks: Allowed ids as bits, by row of logits.
    """
    text = (rows, positions, tokens, num_prompt_tokens)
    if batch is not None:
        if batch.allowed is not None:
            keep_allowed(logits, batch.allowed)
        if batch.bans is not None:
            forbid(logits, batch.bans, *text)
        if batch.biases is not None:
            add_biases(logits, batch.biases)
        if batch.penalised is not None:
            penalise(logits, batch.penalised, *text)
    if masks:
        places = _sent(np.array(list(masks), dtype=np.int32), logits.device)
        words = _words(list(masks.values()), logits.shape[1])
        keep_allowed(logits, Bits(places, _sent(words, logits.device)))
