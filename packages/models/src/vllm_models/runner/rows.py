"""Device rows: what the backend keeps of every sequence between two steps.

Tokens and block tables live in two tensors with a row per sequence, so that the inputs of a step
are gathered by index. Knows nothing of the model; sampling and pooling hang their own state on a
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm_traits import BackendError, Batch, Chunk, PoolingParams, SamplingParams, Start

from vllm_models.runner.edits import Edits, compile_edits
from vllm_models.runner.kv import KVPool

LATE_POSITIONS = 64  # a sequence that reached its limit may still be computed once, drafts included


@dataclass(slots=True)
class Row:
    """One sequence.

    Attributes:
        index: Its row in the tensors.
        params: Sampling or pooling.
        seed: Key of its random numbers.
        num_prompt_tokens: Known tokens that are prompt.
        length: Known tokens: prompt and what was sampled.
        computed: Positions whose KV is valid; None until the first chunk says where it starts.
        num_blocks: Entries of its block table.
        edits: Changes to its logits, if it has any.
        pooled: Sum or vector so far, of a pooling sequence.
        failure: Error code if it cannot run.
    """

    index: int
    params: SamplingParams | PoolingParams
    seed: int
    num_prompt_tokens: int
    length: int
    computed: int | None = None
    num_blocks: int = 0
    edits: Edits | None = None
    pooled: Tensor | None = None
    failure: str | None = None


class Rows:
    """All sequences of a backend.

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
        self.max_sequences = max_sequences
        self.block_size = kv.block_size
        self.sentinel = kv.num_blocks
        self.capacity = max_model_len + LATE_POSITIONS
        self.vocab_size = vocab_size
        # Zeros are memory only once they are written: few sequences are as long as all may be.
        self.tokens = torch.zeros(max_sequences, self.capacity, dtype=torch.int64, device=kv.device)
        self._numbers = self.tokens.numpy() if self.tokens.is_cpu else None  # the same memory
        num_entries = -(-self.capacity // self.block_size)
        self.tables = torch.zeros(max_sequences, num_entries, dtype=torch.int64, device=kv.device)
        self._kv = kv
        self.eos_token_ids = eos_token_ids
        self._rows: dict[int, Row] = {}
        self._free = list(range(max_sequences))
        self._tainted: set[int] = set()

    def __getitem__(self, seq_id: int) -> Row:
        return self._rows[seq_id]

    def __len__(self) -> int:
        return len(self._rows)

    def apply(self, batch: Batch) -> None:
        """Take in what changed: released, starts, and the new blocks of every chunk.

        Raises:
            BackendError: The batch asks for what was never promised.
        """
        for seq_id in batch.released:
            row = self._rows.pop(seq_id, None)
            if row is not None:
                self._free.append(row.index)
        for start in batch.starts:
            self._start(start)
        self._grow(batch.chunks)

    def _start(self, start: Start) -> None:
        if start.seq_id in self._rows or not self._free:
            held = f"{len(self._rows)} of {self.max_sequences} rows are taken"
            raise BackendError(f"Sequence {start.seq_id} cannot start: {held}.")
        length = len(start.token_ids)
        row = Row(
            index=self._free.pop(),
            params=start.params,
            seed=start.seed,
            num_prompt_tokens=start.num_prompt_tokens or length,
            length=length,
        )
        self._rows[start.seq_id] = row
        row.failure = self._refuse(start, row)
        if row.failure is None:
            self.enter(start, row)

    def _refuse(self, start: Start, row: Row) -> str | None:
        """An error code if this sequence alone can never run."""
        if start.adapter is not None:
            return "adapter_not_found"
        if not 0 < len(start.token_ids) <= self.capacity:
            return "context_length_exceeded"
        if not self.known_ids(start.token_ids):
            return "invalid_value"
        if isinstance(start.params, SamplingParams):
            if not self.known_ids(_ids_of(start.params)):
                return "invalid_value"
            self.keep_edits(row, start.params)
        return None

    def enter(self, start: Start, row: Row) -> None:
        """Write what a new sequence knows."""
        self.write_tokens(row, 0, start.token_ids)
        self.tables[row.index] = self.sentinel

    def keep_edits(self, row: Row, params: SamplingParams) -> None:
        """Prepare the changes to a sequence's logits."""
        row.edits = compile_edits(params, self.eos_token_ids, self.vocab_size, self._kv.device)

    def write_tokens(self, row: Row, position: int, token_ids: Sequence[int]) -> None:
        """Set a sequence's tokens from a position on."""
        self.tokens[row.index, position : position + len(token_ids)] = torch.tensor(token_ids)

    def write_sampled(self, written: Sequence[tuple[int, int, int]]) -> None:
        """Keep what was sampled: row, position and token of each."""
        if self._numbers is not None:
            for index, position, token in written:
                self._numbers[index, position] = token
        elif written:
            index, position, token = torch.tensor(written, device=self.tokens.device).unbind(1)
            self.tokens[index, position] = token

    def write_blocks(self, indices: list[int], columns: list[int], blocks: list[int]) -> None:
        """Set entries of block tables: which row, which column, which block."""
        places = torch.tensor((indices, columns, blocks), device=self.tables.device)
        self.tables[places[0], places[1]] = places[2]

    def known_ids(self, token_ids: Sequence[int]) -> bool:
        """Whether all are ids of the vocabulary."""
        return not token_ids or (min(token_ids) >= 0 and max(token_ids) < self.vocab_size)

    def _grow(self, chunks: Sequence[Chunk]) -> None:
        """Append the new blocks of all chunks in one write."""
        indices: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for chunk in chunks:
            row = self._rows[chunk.seq_id]
            if not chunk.new_blocks or row.failure is not None:
                continue
            if self._tainted:
                self._clean(chunk, row)
            indices += [row.index] * len(chunk.new_blocks)
            columns += range(row.num_blocks, row.num_blocks + len(chunk.new_blocks))
            blocks += chunk.new_blocks
            row.num_blocks += len(chunk.new_blocks)
        if not blocks:
            return
        if min(blocks) < 0 or max(blocks) >= self.sentinel or max(columns) >= len(self.tables[0]):
            raise BackendError("The batch names a block that does not exist.")
        self.write_blocks(indices, columns, blocks)

    def taint(self, row: Row) -> None:
        """Remember the blocks of a sequence whose numbers went wrong.

        A position behind a sequence's end counts zero times whatever is stored there, and zero
        times NaN is NaN. So these blocks are wiped before somebody else writes into them.
        """
        self._tainted.update(self.tables[row.index, : row.num_blocks].tolist())

    def _clean(self, chunk: Chunk, row: Row) -> None:
        """Wipe tainted blocks that are new to a sequence and not a cache hit."""
        hits = max(0, chunk.start // self.block_size - row.num_blocks)
        dirty = self._tainted.intersection(chunk.new_blocks[hits:])
        if dirty:
            self._kv.wipe(list(dirty))
            self._tainted -= dirty


def _ids_of(params: SamplingParams) -> list[int]:
    """Every token id that sampling parameters mention."""
    ids = [token for token, _ in params.logit_bias]
    ids += params.allowed_token_ids or ()
    ids += params.stop_token_ids
    for sequence in params.bad_token_ids:
        ids += sequence
    return ids
