"""Decode steps that are recorded once per number of sequences and repeated afterwards.

A step of few rows computes for less time than Python needs to walk through the layers. Repeating
the calls of an earlier step with the same number of rows leaves the walk out; the numbers are the
same in every bit, since the same kernels run in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import Decoder
from vllm_models.native.library import Library
from vllm_models.native.step_inputs import DecodeInputs
from vllm_models.native.tape import Tape, UnrecordableError
from vllm_models.runner.kv import KVPool
from vllm_models.runner.rows import Rows

MAX_ROWS = 64  # beyond them the walk is short beside the step
MAX_BYTES = 256 << 20  # of recordings, which keep the activations of their steps


class _Recording(NamedTuple):
    """A recorded step and the inputs it reads."""

    tape: Tape
    inputs: DecodeInputs
    hidden: Tensor  # [T, M]


class RecordedSteps:
    """The decode steps of one model.

    Args:
        model: With packed weights.
        library: The kernels.
        rows: Every sequence's tokens and tables.
        kv: The pool, in the order of the kernels.
    """

    def __init__(self, model: Decoder, library: Library, rows: Rows, kv: KVPool) -> None:
        self._model = model
        self._library = library
        self._rows = rows
        self._kv = kv
        self._recordings: dict[int, _Recording] = {}
        self._num_bytes = 0
        self._is_possible = True

    def can_run(self, num_rows: int) -> bool:
        """Whether a step of so many sequences, one token each, was or can be recorded."""
        if num_rows in self._recordings:
            return True
        return self._is_possible and num_rows <= MAX_ROWS and self._num_bytes < MAX_BYTES

    def forward(self, places: Sequence[int]) -> Tensor:
        """Final hidden states [T, M], valid until the next step of as many sequences.

        Args:
            places: [T * 2] row and position of each sequence, one after the other.
        """
        recording = self._recordings.get(len(places) // 2)
        if recording is None:
            return self._record(places)
        recording.inputs.place(places)
        recording.tape.replay()
        return recording.hidden

    def _record(self, places: Sequence[int]) -> Tensor:
        rows, count = self._rows, len(places) // 2
        inputs = DecodeInputs(self._library, rows.tokens, rows.tables, rows.block_size, count)
        inputs.place(places)
        ctx = ForwardContext(
            positions=inputs.positions,
            slot_mapping=inputs.slots,
            attention=tuple(inputs.seen_from(window) for window in self._kv.windows),
            kv=self._kv.layers,
        )

        def step() -> Tensor:
            inputs.gather()
            return self._model(inputs.token_ids, ctx)

        tape = Tape(self._library)
        try:
            hidden = tape.record(step)
        except UnrecordableError:
            self._is_possible = False
            return step()
        self._recordings[count] = _Recording(tape, inputs, hidden)
        self._num_bytes += tape.num_bytes
        return hidden
