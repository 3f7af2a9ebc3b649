"""Decode steps of static shape: one token of every sequence, padded to a bucket of rows.

A bucket is two captured pieces, from the gather of tokens to the logits and from there to the next
token, so that edits and masks can be put between them. What a step reads lies in static buffers
that the step itself moves on: as long as the same sequences decode, nothing is sent to the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vllm_models.components.decoder import Decoder
from vllm_models.gpu.sample import Winners, sample
from vllm_models.gpu.step_inputs import keep_sampled
from vllm_models.runner.device.capture import Capture
from vllm_models.runner.device.inputs import Bounds, Sequences, StepInputs, Targets
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.inputs import Inputs


class Scored(NamedTuple):
    """What the first piece leaves.

    Attributes:
        logits: [B, V] float32 or of the model's type.
        positions: [B] int32 of the tokens to come.
    """

    logits: Tensor
    positions: Tensor


class _Bucket:
    """The captured pieces of one number of rows.

    Args:
        score: From the state to the logits.
        choose: From what `score` left to the next tokens.
        capture: How a piece is repeated.
    """

    scored: Scored  # what the first piece left last

    def __init__(
        self, score: Callable[[], Scored], choose: Callable[[Scored], Winners], capture: Capture
    ) -> None:
        def keep_scored() -> None:
            self.scored = score()

        self._forward = capture(keep_scored)
        self.sample = capture(lambda: choose(self.scored))

    def forward(self) -> Scored:
        """The first piece; `sample` is the second."""
        self._forward()
        return self.scored


def bucket_sizes(max_sequences: int) -> tuple[int, ...]:
    """Numbers of rows that are captured: closer together where padding costs more."""
    largest = min(max_sequences, 1024)
    sizes = (1, 2, 4, *range(8, 32, 4), *range(32, 256, 16), *range(256, 1024, 64))
    return (*(size for size in sizes if size < largest), largest)


class DecodeSteps:
    """All buckets of one model.

    Args:
        model: With its weights.
        inputs: Makes the inputs of its steps.
        sizes: Rows of the buckets, ascending.
        capture: How a piece is repeated.
    """

    def __init__(
        self, model: Decoder, inputs: StepInputs, sizes: Sequence[int], capture: Capture
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._rows = rows = inputs.rows
        self._bounds = Bounds(1, 1, rows.capacity)
        self._sizes = tuple(sizes)
        largest, device = self._sizes[-1], rows.device
        self._state = torch.zeros(3, largest, dtype=torch.int32, device=device)
        self._state[0] = rows.scratch
        self._order = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._on_device: list[tuple[int, int]] | None = None  # row and first position, as sent
        self._buckets = {size: self._make(size, capture) for size in reversed(self._sizes)}

    def bucket_of(self, num_rows: int) -> int | None:
        """The smallest bucket that holds so many rows."""
        return next((size for size in self._sizes if size >= num_rows), None)

    def forward(self, inputs: Inputs, upload: Upload) -> Scored:
        """Compute one token of every sequence; the first rows of the result are theirs."""
        wanted = [(work.row.index, work.start) for work in inputs.works]
        size = self.bucket_of(len(wanted))
        assert size is not None
        if wanted != self._on_device:
            self._send(wanted, upload)
        self._on_device = None  # until `keep` has moved it on
        return self._buckets[size].forward()

    def sample(self, inputs: Inputs) -> Winners:
        """Sample where nothing has to be done to the logits before."""
        size = self.bucket_of(len(inputs.works))
        assert size is not None
        winners = self._buckets[size].sample()
        self._moved(inputs)
        count = len(inputs.works)
        return Winners(winners.token_ids[:count], winners.scores[:count])

    def keep(self, inputs: Inputs, positions: Tensor, token_ids: Tensor) -> None:
        """Keep what was sampled in another way."""
        count = len(token_ids)
        rows, first, advance = (each[:count] for each in self._state)
        keep_sampled(self._rows.tokens, rows, positions[:count], token_ids, first, advance)
        self._moved(inputs)

    def targets(self, count: int, positions: Tensor) -> Targets:
        """The first rows as targets."""
        return Targets(self._order[:count].long(), self._state[0, :count], positions[:count])

    def _send(self, wanted: list[tuple[int, int]], upload: Upload) -> None:
        """All rows of the largest bucket: those that are not used write where nobody reads."""
        state = np.zeros((3, self._sizes[-1]), dtype=np.int32)
        state[0] = self._rows.scratch
        state[:2, : len(wanted)] = np.array(wanted, dtype=np.int32).T
        state[2, : len(wanted)] = 1
        [sent] = upload.send([state])
        self._state.copy_(sent.view_as(self._state))

    def _moved(self, inputs: Inputs) -> None:
        self._on_device = [(work.row.index, work.end) for work in inputs.works]

    def _make(self, size: int, capture: Capture) -> _Bucket:
        rows, first, advance = (each[:size] for each in self._state)
        sequences = Sequences(rows, first, self._order[: size + 1], self._order[:size])

        def choose(scored: Scored) -> Winners:
            winners = sample(scored.logits, rows, scored.positions, self._rows.sampling)
            keep_sampled(
                self._rows.tokens, rows, scored.positions, winners.token_ids, first, advance
            )
            return winners

        return _Bucket(lambda: self._score(sequences), choose, capture)

    def _score(self, sequences: Sequences) -> Scored:
        token_ids, ctx, lengths = self._inputs.make(sequences, self._bounds)
        return Scored(self._model.logits(self._model(token_ids, ctx)), lengths)
