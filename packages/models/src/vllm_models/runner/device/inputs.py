"""The tensors of a ragged forward pass, made on the device from its own state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vllm_models.components.context import ForwardContext
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


def token_ids_and_context(
    sequences: Sequences, rows: DeviceRows, kv: KVPool, max_queries: int, max_length: int
) -> tuple[Tensor, ForwardContext, Tensor]:
    """Token ids [T], what else a forward pass needs, and the sequences' lengths [S] after it.

    Args:
        sequences: Of the step.
        rows: State.
        kv: Pool.
        max_queries: Of any sequence in the step.
        max_length: No sequence is longer after it.
    """
    token_ids, positions, slots, lengths = gather_inputs(
        *sequences, rows.tokens, rows.tables, rows.block_size
    )
    attention = {
        window: GpuSpans(
            rows=sequences.rows,
            starts=sequences.starts,
            lengths=lengths,
            tables=rows.tables,
            window=window,
            max_queries=max_queries,
            max_length=max_length,
        )
        for window in set(kv.windows)
    }
    ctx = ForwardContext(
        positions=positions,
        slot_mapping=slots,
        attention=tuple(attention[window] for window in kv.windows),
        kv=kv.layers,
    )
    return token_ids, ctx, lengths
