"""From a batch to the tensors of one ragged forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm_traits import BackendError, Chunk, PoolingParams

from vllm_models.components.context import ForwardContext
from vllm_models.kernels.paged_attention import Prepared, Span, prepare, prepare_native
from vllm_models.native.attention import Spans
from vllm_models.runner.edits import Target
from vllm_models.runner.kv import KVPool
from vllm_models.runner.rows import Row, Rows


@dataclass(slots=True)
class Work:
    """A chunk with its place in the step.

    Attributes:
        chunk: What was asked for.
        row: Its sequence's row.
        start: First position computed, by the backend's own count.
        first: Place of that position among the step's tokens.
    """

    chunk: Chunk
    row: Row
    start: int
    first: int

    @property
    def end(self) -> int:
        """One past the last position computed."""
        return self.start + self.chunk.num_tokens

    @property
    def places(self) -> slice:
        """The chunk's share of the step's tokens."""
        return slice(self.first, self.first + self.chunk.num_tokens)


@dataclass(slots=True)
class Inputs:
    """One step, ready to run.

    Attributes:
        works: Chunks that run.
        failed: Sequences that do not, with an error code.
        targets: Tokens to be sampled, drafts to be verified included, chunk by chunk.
        target_places: Where among the step's tokens the logits of each target come from.
    """

    works: list[Work] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    target_places: list[int] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """Row and first position of every chunk, one after the other."""
        return [number for work in self.works for number in (work.row.index, work.start)]


def place_chunks(chunks: Sequence[Chunk], rows: Rows) -> Inputs:
    """Lay the chunks out one after the other and write their drafts behind the known tokens."""
    inputs = Inputs()
    first = 0
    for chunk in chunks:
        row = rows[chunk.seq_id]
        start = chunk.start if row.computed is None else row.computed
        row.failure = row.failure or _refuse(chunk, row, start, rows)
        if row.failure:
            inputs.failed[chunk.seq_id] = row.failure
            continue
        work = Work(chunk, row, start, first)
        row.computed = work.end
        inputs.works.append(work)
        first += chunk.num_tokens
        if chunk.draft_ids:
            rows.write_tokens(row, work.end - chunk.num_drafts, chunk.draft_ids)
        if chunk.sample and not isinstance(row.params, PoolingParams):
            for place in range(first - chunk.num_drafts - 1, first):
                inputs.targets.append(Target(chunk.seq_id, row, start + place - work.first + 1))
                inputs.target_places.append(place)
    return inputs


def _refuse(chunk: Chunk, row: Row, start: int, rows: Rows) -> str | None:
    """An error code if a chunk cannot run; a broken promise of the host ends the batch.

    Raises:
        BackendError: The chunk covers tokens that nobody knows, or positions without a block.
    """
    end = start + chunk.num_tokens
    known = row.length + chunk.num_drafts
    if chunk.num_tokens < 1 or len(chunk.draft_ids) != chunk.num_drafts or end > known:
        raise BackendError(f"{chunk} does not fit a sequence of {row.length} known tokens.")
    if end > row.num_blocks * rows.block_size:
        raise BackendError(f"{chunk} ends at {end}, beyond its {row.num_blocks} blocks.")
    if end > rows.capacity - 1:
        return "context_length_exceeded"
    return None if rows.known_ids(chunk.draft_ids) else "invalid_value"


def token_ids_and_context(
    works: Sequence[Work], rows: Rows, kv: KVPool
) -> tuple[Tensor, ForwardContext]:
    """Token ids [T] of the step and everything else a forward pass needs."""
    indices: list[int] = []
    places: list[int] = []
    spans: list[Span] = []
    for work in works:
        num_tokens = work.chunk.num_tokens
        indices += [work.row.index] * num_tokens
        places += range(work.start, work.end)
        spans.append(Span(work.row.index, num_tokens, work.end))
    row, positions = torch.tensor((indices, places), device=kv.device)
    attention = {window: _prepare(spans, rows, kv, window) for window in set(kv.windows)}
    blocks = rows.tables[row, positions // rows.block_size]
    ctx = ForwardContext(
        positions=positions,
        slot_mapping=blocks * rows.block_size + positions % rows.block_size,
        attention=tuple(attention[window] for window in kv.windows),
        kv=kv.layers,
    )
    return rows.tokens[row, positions], ctx


def _prepare(spans: Sequence[Span], rows: Rows, kv: KVPool, window: int) -> Prepared | Spans:
    if kv.layout == "native":
        return prepare_native(spans, rows.tables, window)
    return prepare(spans, rows.tables, rows.block_size, kv.compute_dtype, window)
