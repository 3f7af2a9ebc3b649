"""Rows whose tokens, tables and sampling parameters lie on the device and change by differences.

Whatever a batch changes is collected on the host and sent in one copy, before the step reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm_traits import SamplingParams, Start

from vllm_models.gpu.edits import compile_row
from vllm_models.gpu.sample import SamplingState
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.kv import KVPool
from vllm_models.runner.rows import Row, Rows

_INTS, _FLOATS = 2, 3  # top_k, num_prompt_tokens; temperature, top_p, min_p


class DeviceRows(Rows):
    """All sequences of a backend, and one more row that fills the buckets of captured steps.

    Args:
        max_sequences: Rows.
        max_model_len: Longest sequence in tokens.
        kv: The pool; its last block pads the tables.
        vocab_size: Width of the logits.
        eos_token_ids: What `min_tokens` forbids besides stop ids.
    """

    def __init__(
        self,
        max_sequences: int,
        max_model_len: int,
        kv: KVPool,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        super().__init__(max_sequences, max_model_len, kv, vocab_size, eos_token_ids)
        self.scratch = max_sequences
        self.device = kv.device
        count, width = max_sequences + 1, self.tables.shape[1]
        self.tokens = torch.zeros(count, self.capacity, dtype=torch.int32, device=kv.device)
        self.tables = torch.full((count, width), self.sentinel, dtype=torch.int32, device=kv.device)
        self._ints = torch.zeros(_INTS, count, dtype=torch.int32, device=kv.device)
        self._floats = torch.zeros(_FLOATS, count, dtype=torch.float32, device=kv.device)
        self._seeds = torch.zeros(count, 2, dtype=torch.int32, device=kv.device)
        self._tokens: list[tuple[int, Sequence[int]]] = []  # place in `tokens`, flat, and values
        self._blocks: list[tuple[int, int]] = []  # place in `tables`, flat, and block
        self._params: list[tuple[Row, SamplingParams]] = []

    @property
    def num_prompt_tokens(self) -> Tensor:
        """[R + 1] int32."""
        return self._ints[1]

    @property
    def sampling(self) -> SamplingState:
        """How each row samples."""
        temperature, top_p, min_p = self._floats
        return SamplingState(temperature, self._ints[0], top_p, min_p, self._seeds)

    def enter(self, start: Start, row: Row) -> None:
        """Collect what a new sequence knows; entries past the end of its table are never read."""
        self.write_tokens(row, 0, start.token_ids)
        if isinstance(start.params, SamplingParams):
            self._params.append((row, start.params))

    def keep_edits(self, row: Row, params: SamplingParams) -> None:
        """Prepare the changes to a sequence's logits."""
        row.edits = compile_row(params, self.eos_token_ids, self.vocab_size, self.device)

    def write_tokens(self, row: Row, position: int, token_ids: Sequence[int]) -> None:
        """Collect a sequence's tokens from a position on."""
        self._tokens.append((row.index * self.capacity + position, token_ids))

    def write_blocks(self, indices: list[int], columns: list[int], blocks: list[int]) -> None:
        """Collect entries of block tables."""
        width = self.tables.shape[1]
        places = (index * width + column for index, column in zip(indices, columns, strict=True))
        self._blocks += zip(places, blocks, strict=True)

    def taint(self, row: Row) -> None:
        """Nothing to remember: the kernels do not read behind a sequence's end."""

    def send(self, upload: Upload) -> None:
        """Bring the device up to date."""
        if not (self._tokens or self._blocks or self._params):
            return
        blocks = np.array(self._blocks, dtype=np.int32).reshape(-1, 2)
        sent = upload.send(
            [*_runs(self._tokens), blocks[:, 0], blocks[:, 1], *_parameters(self._params)]
        )
        if self._tokens:
            self.tokens.view(-1).index_copy_(0, sent[0].long(), sent[1])
        if self._blocks:
            self.tables.view(-1).index_copy_(0, sent[2].long(), sent[3])
        if self._params:
            rows = sent[4].long()
            self._ints.index_copy_(1, rows, sent[5].view(_INTS, -1))
            self._floats.index_copy_(1, rows, sent[6].view(torch.float32).view(_FLOATS, -1))
            self._seeds.index_copy_(0, rows, sent[7].view(-1, 2))
        self._tokens, self._blocks, self._params = [], [], []


def _runs(written: Sequence[tuple[int, Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of runs of tokens."""
    empty = np.empty(0, np.int32)
    places = (np.arange(first, first + len(ids), dtype=np.int32) for first, ids in written)
    values = (np.array(ids, dtype=np.int32) for _, ids in written)
    return np.concatenate((empty, *places)), np.concatenate((empty, *values))


def _parameters(params: Sequence[tuple[Row, SamplingParams]]) -> tuple[np.ndarray, ...]:
    """Rows [n], [_INTS, n], [_FLOATS, n] and seeds [n, 2]; all as int32."""
    ints = [(p.top_k, row.num_prompt_tokens) for row, p in params]
    floats = [(p.temperature, p.top_p, p.min_p) for _, p in params]
    seeds = [row.seed & (1 << 64) - 1 for row, _ in params]
    return (
        np.array([row.index for row, _ in params], dtype=np.int32),
        np.array(ints, dtype=np.int32).reshape(-1, _INTS).T,
        np.ascontiguousarray(np.array(floats, np.float32).reshape(-1, _FLOATS).T).view(np.int32),
        np.array(seeds, dtype=np.uint64).view(np.int32),
    )
