"""Inputs of a step from the state that lies on the device, and what it leaves there.

Token t belongs to sequence s = owners[t] and stands at p = positions of s from its first one:

    token_ids[t] = tokens[rows[s], p]      slots[t] = tables[rows[s], p // P] * P + p % P
    lengths[s]   = one past the last position of s

rows, first [S]; starts [S + 1]; owners [T]; tokens [R + 1, C]; tables [R + 1, N]; all int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 128


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_kernel(
    token_ids,
    positions,
    slots,
    lengths,
    rows,
    first,
    starts,
    owners,
    tokens,
    tables,
    num_tokens,
    capacity,
    table_width,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = place < num_tokens
    owner = tl.load(owners + place, mask=there, other=0)
    row = tl.load(rows + owner, mask=there, other=0).to(tl.int64)
    start = tl.load(starts + owner, mask=there, other=0)
    end = tl.load(starts + owner + 1, mask=there, other=0)
    position = tl.load(first + owner, mask=there, other=0) + place - start
    block = tl.load(tables + row * table_width + position // BLOCK_SIZE, mask=there, other=0)
    token = tl.load(tokens + row * capacity + position, mask=there, other=0)
    tl.store(token_ids + place, token, mask=there)
    tl.store(positions + place, position, mask=there)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slots + place, slot, mask=there)
    tl.store(lengths + owner, position + 1, mask=there & (place == end - 1))


def gather_inputs(
    rows: Tensor,
    first: Tensor,
    starts: Tensor,
    owners: Tensor,
    tokens: Tensor,
    tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids [T], positions [T] and slots [T] int64, and lengths [S] int32.

    Args:
        rows: [S] of every sequence in the state; each has at least one token in the step.
        first: [S] first position that is computed.
        starts: [S + 1] place of that position among the tokens of the step.
        owners: [T] which of the S sequences a token belongs to.
        tokens: [R + 1, C].
        tables: [R + 1, N].
        block_size: Positions per block.
    """
    num_tokens, device = len(owners), owners.device
    token_ids = torch.empty(num_tokens, dtype=torch.int64, device=device)
    positions, slots = torch.empty_like(token_ids), torch.empty_like(token_ids)
    lengths = torch.empty_like(rows)
    _gather_kernel[(triton.cdiv(num_tokens, _TILE),)](
        *(token_ids, positions, slots, lengths, rows, first, starts, owners, tokens, tables),
        *(num_tokens, tokens.shape[1], tables.shape[1]),
        BLOCK_SIZE=block_size,
        TILE=_TILE,
    )
    return token_ids, positions, slots, lengths


@triton.jit(do_not_specialize=["num_targets"])
def _keep_kernel(
    tokens, rows, positions, token_ids, first, advance, num_targets, capacity, TILE: tl.constexpr
):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = place < num_targets
    row = tl.load(rows + place, mask=there, other=0).to(tl.int64)
    position = tl.load(positions + place, mask=there, other=0)
    token = tl.load(token_ids + place, mask=there, other=0)
    tl.store(tokens + row * capacity + position, token.to(tl.int32), mask=there)
    step = tl.load(advance + place, mask=there, other=0)
    start = tl.load(first + place, mask=there, other=0)
    tl.store(first + place, start + step, mask=there)


def keep_sampled(
    tokens: Tensor,
    rows: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    first: Tensor,
    advance: Tensor,
) -> None:
    """Write what was sampled behind each sequence and move its first position on.

    Args:
        tokens: [R + 1, C], changed in place.
        rows: [N] int32.
        positions: [N] int32 where the new tokens stand.
        token_ids: [N] int64.
        first: [N] int32, changed in place.
        advance: [N] int32 added to `first`: 1, or 0 for rows that only fill the bucket.
    """
    num_targets = len(rows)
    _keep_kernel[(triton.cdiv(num_targets, _TILE),)](
        *(tokens, rows, positions, token_ids, first, advance),
        *(num_targets, tokens.shape[1]),
        TILE=_TILE,
    )


def reference(
    rows: Tensor,
    first: Tensor,
    starts: Tensor,
    owners: Tensor,
    tokens: Tensor,
    tables: Tensor,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gather_inputs`, token by token."""
    token_ids, positions, slots = [], [], []
    for place, owner in enumerate(owners.tolist()):
        row = int(rows[owner])
        position = int(first[owner]) + place - int(starts[owner])
        token_ids.append(int(tokens[row, position]))
        positions.append(position)
        block = int(tables[row, position // block_size])
        slots.append(block * block_size + position % block_size)
    lengths = first + starts.diff()
    found = (torch.tensor(values, device=owners.device) for values in (token_ids, positions, slots))
    return (*found, lengths)


def variants() -> tuple[Variant, ...]:
    """For the sizes of any model."""
    pointers = {
        **dict.fromkeys(("token_ids", "positions", "slots"), "*i64"),
        **dict.fromkeys(("lengths", "rows", "first", "starts", "owners"), "*i32"),
        **dict.fromkeys(("tokens", "tables"), "*i32"),
        **dict.fromkeys(("num_tokens", "capacity", "table_width"), "i32"),
    }
    kept = {
        **dict.fromkeys(("tokens", "rows", "positions"), "*i32"),
        "token_ids": "*i64",
        **dict.fromkeys(("first", "advance"), "*i32"),
        **dict.fromkeys(("num_targets", "capacity"), "i32"),
    }
    return (
        Variant("gather_inputs", _gather_kernel, pointers, {"BLOCK_SIZE": 64, "TILE": _TILE}),
        Variant("keep_sampled", _keep_kernel, kept, {"TILE": _TILE}),
    )
