"""The tensors of a ragged forward pass, made on the device from its own state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vllm_models.components.context import ForwardContext
from vllm_models.gpu.paged_chunks import plan, queries_for
from vllm_models.gpu.spans import GpuSpans
from vllm_models.gpu.step_inputs import gather_inputs
from vllm_models.runner.device.rows import DeviceRows
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.inputs import Inputs
from vllm_models.runner.kv import KVPool


class Sequences(NamedTuple):
    """Which sequences a step computes, on the device; all int32.

    Attributes:
        rows: [S] in the state.
        first: [S] first position computed.
        starts: [S + 1] its place among the step's T tokens.
        owners: [T] whose each token is.
    """

    rows: Tensor
    first: Tensor
    starts: Tensor
    owners: Tensor


class Targets(NamedTuple):
    """What a step samples, on the device.

    Attributes:
        places: [N] int64 among the step's tokens.
        rows: [N] int32 in the state.
        positions: [N] int32 of the new tokens, drafts counted.
    """

    places: Tensor
    rows: Tensor
    positions: Tensor


def send_step(inputs: Inputs, upload: Upload) -> tuple[Sequences, Targets]:
    """Tell the device what to compute and what to sample."""
    works, targets = inputs.works, inputs.targets
    counts = [work.chunk.num_tokens for work in works]
    sent = upload.send(
        [
            _array([work.row.index for work in works]),
            _array([work.start for work in works]),
            np.concatenate((_array([0]), np.cumsum(_array(counts), dtype=np.int32))),
            np.repeat(np.arange(len(works), dtype=np.int32), counts),
            _array(inputs.target_places),
            _array([target.row.index for target in targets]),
            _array([target.length for target in targets]),
        ]
    )
    return Sequences(*sent[:4]), Targets(sent[4].long(), *sent[5:])


def _array(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


class Bounds(NamedTuple):
    """What the host knows of all sequences of a step, and of every replay of it.

    Attributes:
        min_queries: No sequence computes fewer positions.
        max_queries: None computes more.
        max_length: None is longer after it.
    """

    min_queries: int
    max_queries: int
    max_length: int


class StepInputs:
    """Makes what a forward pass reads.

    Args:
        rows: State.
        kv: Pool.
        num_heads: Query heads of the model.
    """

    def __init__(self, rows: DeviceRows, kv: KVPool, num_heads: int) -> None:
        self.rows = rows
        self.kv = kv
        self._num_heads = num_heads
        kv_heads = (keys.data.shape[1] for keys, _ in kv.layers)
        self._kinds = tuple(zip(kv.windows, kv_heads, strict=True))  # of every layer

    def make(self, sequences: Sequences, bounds: Bounds) -> tuple[Tensor, ForwardContext, Tensor]:
        """Token ids [T], what else a forward pass needs, and lengths [S] after it."""
        rows = self.rows
        token_ids, positions, slots, lengths = gather_inputs(
            *sequences, rows.tokens, rows.tables, rows.block_size
        )
        attention = {
            kind: self._spans(sequences, lengths, bounds, *kind) for kind in set(self._kinds)
        }
        ctx = ForwardContext(
            positions=positions,
            slot_mapping=slots,
            attention=tuple(attention[kind] for kind in self._kinds),
            kv=self.kv.layers,
        )
        return token_ids, ctx, lengths

    def _spans(
        self, sequences: Sequences, lengths: Tensor, bounds: Bounds, window: int, kv_heads: int
    ) -> GpuSpans:
        """Who attends to what in the layers of one kind, which share the list of chunks."""
        spans = GpuSpans(
            rows=sequences.rows,
            starts=sequences.starts,
            lengths=lengths,
            tables=self.rows.tables,
            window=window,
            max_queries=bounds.max_queries,
            max_length=bounds.max_length,
            min_queries=bounds.min_queries,
        )
        few = queries_for(bounds.max_queries, self._num_heads // kv_heads)
        if bounds.min_queries > few:
            return spans
        return spans._replace(chunks=plan(spans, self._num_heads, kv_heads))
