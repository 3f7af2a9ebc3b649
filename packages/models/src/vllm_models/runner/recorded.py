"""Decode steps that are recorded once per number of sequences and repeated afterwards.

A step of few rows computes for less time than Python needs to walk through the layers. Repeating
the calls of an earlier step with the same number of rows leaves the walk out; the numbers are the
same in every bit, since the same kernels run in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vllm_models.components.context import ForwardContext
from vllm_models.components.decoder import Decoder
from vllm_models.native.attention import Spans
from vllm_models.native.library import Library
from vllm_models.native.tape import Tape, UnrecordableError

MAX_ROWS = 64  # beyond them the walk is short beside the step
MAX_BYTES = 256 << 20  # of recordings, which keep the activations of their steps


class _Recording(NamedTuple):
    """A recorded step and the inputs it reads."""

    tape: Tape
    token_ids: Tensor  # [T]
    ctx: ForwardContext
    hidden: Tensor  # [T, M]


class RecordedSteps:
    """The decode steps of one model.

    Args:
        model: With packed weights.
        library: The kernels.
    """

    def __init__(self, model: Decoder, library: Library) -> None:
        self._model = model
        self._library = library
        self._recordings: dict[int, _Recording] = {}
        self._num_bytes = 0
        self._is_possible = True

    def can_run(self, num_rows: int) -> bool:
        """Whether a step of so many sequences, one token each, was or can be recorded."""
        if num_rows in self._recordings:
            return True
        return self._is_possible and num_rows <= MAX_ROWS and self._num_bytes < MAX_BYTES

    def forward(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Final hidden states, valid until the next step of as many rows: [T] -> [T, M]."""
        recording = self._recordings.get(len(token_ids))
        if recording is None:
            return self._record(token_ids, ctx)
        recording.token_ids.copy_(token_ids)
        recording.ctx.positions.copy_(ctx.positions)
        recording.ctx.slot_mapping.copy_(ctx.slot_mapping)
        _spans(recording.ctx).copy_(_spans(ctx))
        recording.tape.replay()
        return recording.hidden

    def _record(self, token_ids: Tensor, ctx: ForwardContext) -> Tensor:
        tape = Tape(self._library)
        spans = _spans(ctx).clone()  # the same for every window
        own = ctx._replace(
            positions=ctx.positions.clone(),
            slot_mapping=ctx.slot_mapping.clone(),
            attention=[layer._replace(spans=spans) for layer in _native(ctx)],
        )
        own_ids = token_ids.clone()
        try:
            hidden = tape.record(lambda: self._model(own_ids, own))
        except UnrecordableError:
            self._is_possible = False
            return self._model(token_ids, ctx)
        self._recordings[len(token_ids)] = _Recording(tape, own_ids, own, hidden)
        self._num_bytes += tape.num_bytes
        return hidden


def _native(ctx: ForwardContext) -> list[Spans]:
    return [layer for layer in ctx.attention if isinstance(layer, Spans)]


def _spans(ctx: ForwardContext) -> Tensor:
    return _native(ctx)[0].spans
