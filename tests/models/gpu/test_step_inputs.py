"""Inputs of a step from state on the device."""

from __future__ import annotations

import pytest
import torch
from vllm_models.gpu import step_inputs


def state(device: torch.device, num_rows: int = 5, capacity: int = 300, block_size: int = 16):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9999, (num_rows, capacity), generator=generator, dtype=torch.int32)
    width = -(-capacity // block_size)
    tables = torch.randint(0, 1 << 20, (num_rows, width), generator=generator, dtype=torch.int32)
    return tokens.to(device), tables.to(device)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    ("rows", "first", "counts"),
    [
        ([3], [0], [1]),
        ([0, 4, 2], [7, 0, 100], [1, 1, 1]),
        ([1, 2, 0, 3], [0, 15, 16, 250], [17, 1, 130, 3]),
    ],
)
def test_inputs_equal_the_reference(device, rows, first, counts, block_size) -> None:
    tokens, tables = state(device, block_size=block_size)
    starts = torch.tensor([0, *counts]).cumsum(0)
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    sequences = [
        torch.as_tensor(values).to(device, torch.int32) for values in (rows, first, starts, owners)
    ]
    arguments = (*sequences, tokens, tables, block_size)
    found, expected = step_inputs.gather_inputs(*arguments), step_inputs.reference(*arguments)
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == other.tolist()


def test_blocks_far_into_the_pool_have_slots_beyond_32_bits(device) -> None:
    tokens, tables = state(device)
    tables[:] = (1 << 31) - 1
    one = torch.ones(1, dtype=torch.int32, device=device)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    slots = step_inputs.gather_inputs(one, one * 17, starts, one * 0, tokens, tables, 64)[2]
    assert slots.tolist() == [((1 << 31) - 1) * 64 + 17]


def test_sampled_tokens_are_kept_and_only_live_rows_move_on(device) -> None:
    tokens, _ = state(device)
    before = tokens.clone()
    rows, positions, first, advance = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in ([2, 0, 4], [10, 299, 0], [9, 298, 0], [1, 1, 0])
    )
    token_ids = torch.tensor([11, 12, 13], device=device)
    step_inputs.keep_sampled(tokens, rows, positions, token_ids, first, advance)
    assert first.tolist() == [10, 299, 0]
    for row, position, token in ((2, 10, 11), (0, 299, 12), (4, 0, 13)):
        before[row, position] = token
    assert torch.equal(tokens, before)
