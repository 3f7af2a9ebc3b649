"""The inputs of a decode step in C against those that torch gathers for any step."""

from __future__ import annotations

import pytest
import torch
from vllm_models.native.library import Library, load
from vllm_models.native.processor import InstructionSet, runnable
from vllm_models.native.step_inputs import DecodeInputs

BLOCK, CAPACITY, ROWS = 16, 70, 6


@pytest.fixture(params=runnable(), scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return load(InstructionSet(request.param))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_tokens_and_slots_are_those_of_rows_and_positions(library: Library, count: int) -> None:
    torch.manual_seed(count)
    tokens = torch.randint(0, 1000, (ROWS, CAPACITY))
    tables = torch.randint(0, 50, (ROWS, 5))
    inputs = DecodeInputs(library, tokens, tables, BLOCK, count)
    for _ in range(3):  # again, over what the step before left
        rows, positions = torch.randperm(ROWS)[:count], torch.randint(0, CAPACITY, (count,))
        inputs.place(torch.stack((rows, positions), 1).flatten().tolist())
        inputs.gather()
        blocks = tables[rows, positions // BLOCK]
        assert torch.equal(inputs.token_ids, tokens[rows, positions])
        assert torch.equal(inputs.positions, positions)
        assert torch.equal(inputs.slots, blocks * BLOCK + positions % BLOCK)
        ones = torch.ones_like(rows)
        assert torch.equal(inputs.spans, torch.stack((rows, ones, positions + 1), 1))
        assert inputs.seen_from(7) == (inputs.spans, tables, 7)


def test_places_of_another_number_of_sequences_are_refused(library: Library) -> None:
    tokens, tables = torch.zeros(ROWS, CAPACITY).long(), torch.zeros(ROWS, 5).long()
    inputs = DecodeInputs(library, tokens, tables, BLOCK, 2)
    with pytest.raises(ValueError):
        inputs.place([0, 1])
