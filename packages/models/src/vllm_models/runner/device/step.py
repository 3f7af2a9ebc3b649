"""A batch that was launched, and what of it the host reads later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from vllm_traits import EMPTY, BatchOutput, StepCost, TokenLogprobs

from vllm_models.runner import pool
from vllm_models.runner.device.fetch import Fetch, Timer
from vllm_models.runner.inputs import Inputs, Work
from vllm_models.runner.logprobs import entries
from vllm_models.runner.sample import NON_FINITE, code_of


class Asked(NamedTuple):
    """Log-probabilities of n tokens that somebody wants to read.

    Attributes:
        seq_ids: [n] whose they are.
        num_top: [n] how many of the most likely tokens to list.
        tensors: Token ids [n], and what `vllm_models.runner.logprobs.entries` wants.
    """

    seq_ids: list[int]
    num_top: list[int]
    tensors: tuple[Tensor, ...]


@dataclass
class Launched:
    """What a step left on the device.

    Attributes:
        token_ids: [N] int64 of the targets; None if nothing was sampled.
        best: [N] the winning scores, which say whether all went well.
        logprobs: Of sampled tokens.
        prompt_logprobs: Of prompt tokens.
        vectors: [M] of each pooling sequence that is done.
    """

    token_ids: Tensor | None = None
    best: Tensor | None = None
    logprobs: list[Asked] = field(default_factory=list)
    prompt_logprobs: list[Asked] = field(default_factory=list)
    vectors: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All of them, in the order in which they are read."""
        found = [t for t in (self.token_ids, self.best) if t is not None]
        for asked in (*self.logprobs, *self.prompt_logprobs):
            found += asked.tensors
        return found + list(self.vectors.values())


class DeviceStep:
    """Implements `InFlight`.

    Args:
        inputs: What runs, what does not, and what is to be sampled.
        launch: Launches the sampling under some masks.
        cost: The cost of a step of so many seconds.
        timer: Started with the step.
    """

    def __init__(
        self,
        inputs: Inputs,
        launch: Callable[[Mapping[int, bytes]], Launched],
        cost: Callable[[Inputs, float], StepCost],
        timer: Timer,
    ) -> None:
        self._inputs = inputs
        self._launch = launch
        self._cost = cost
        self._timer = timer
        self._launched = Launched()
        self._fetch: Fetch | None = None
        self._output: BatchOutput | None = None

    @property
    def is_sampled(self) -> bool:
        """Whether sampling was launched."""
        return self._fetch is not None

    @torch.inference_mode()
    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Launch sampling; does nothing if it was launched together with the step."""
        if self.is_sampled:
            return
        self._launched = self._launch(masks)
        self._fetch = Fetch(self._launched.tensors())
        self._timer.stop()
        for target in self._inputs.targets:
            target.row.length = target.length + 1  # drafts are corrected when they are read

    def done(self) -> bool:
        """Whether everything has arrived on the host."""
        return self._output is not None or (self._fetch is not None and self._fetch.done())

    def result(self) -> BatchOutput:
        """Wait for the device, and read."""
        if self._output is None:
            assert self._fetch is not None, "result() before sample()"
            self._output = self._read(iter(self._fetch.wait()))
        return self._output

    def _read(self, arrived: Iterator[Tensor]) -> BatchOutput:
        token_ids: dict[int, tuple[int, ...]] = {}
        if self._launched.token_ids is not None:
            token_ids = self._accept(next(arrived).tolist(), next(arrived).tolist())
        logprobs = _described(self._launched.logprobs, arrived)
        prompt_logprobs = _described(self._launched.prompt_logprobs, arrived)
        embeddings = self._embeddings(arrived)
        failed = self._inputs.failed
        return BatchOutput(
            token_ids,
            {i: logprobs[i][: len(ids)] for i, ids in token_ids.items() if i in logprobs},
            {i: found for i, found in prompt_logprobs.items() if i not in failed},
            embeddings,
            failed,
            self._cost(self._inputs, self._timer.seconds()),
        )

    def _accept(self, sampled: list[int], best: list[float]) -> dict[int, tuple[int, ...]]:
        """Per sequence: tokens up to the first that differs from its draft, or a failure."""
        found: dict[int, tuple[int, ...]] = {}
        for work, first in _sampling(self._inputs):
            drafts = work.chunk.draft_ids
            right = 0
            while right < len(drafts) and sampled[first + right] == drafts[right]:
                right += 1
            code = next(filter(None, map(code_of, best[first : first + right + 1])), "")
            if code:
                work.row.failure = self._inputs.failed[work.chunk.seq_id] = code
                continue
            found[work.chunk.seq_id] = tuple(sampled[first : first + right + 1])
            if drafts:
                work.row.length = work.end - len(drafts) + right + 1
                work.row.computed = work.row.length - 1
        return found

    def _embeddings(self, arrived: Iterator[Tensor]) -> dict[int, tuple[float, ...]]:
        found = {seq_id: pool.read(next(arrived)) for seq_id in self._launched.vectors}
        for seq_id, vector in found.items():
            if not vector:
                self._inputs.failed[seq_id] = NON_FINITE
        return {seq_id: vector for seq_id, vector in found.items() if vector}


def _sampling(inputs: Inputs) -> Iterator[tuple[Work, int]]:
    """Everything that samples, with the place of its first target."""
    first = 0
    for work in inputs.works:
        if first < len(inputs.targets) and inputs.targets[first].row is work.row:
            yield work, first
            first += 1 + work.chunk.num_drafts


def _described(
    groups: list[Asked], arrived: Iterator[Tensor]
) -> dict[int, tuple[TokenLogprobs, ...]]:
    """What was asked for, by sequence."""
    found: dict[int, tuple[TokenLogprobs, ...]] = {}
    for seq_ids, num_top, tensors in groups:
        token_ids, *scores = (next(arrived) for _ in tensors)
        described = zip(seq_ids, entries(token_ids.tolist(), num_top, scores), strict=True)
        for seq_id, own in groupby(described, key=lambda pair: pair[0]):
            found[seq_id] = found.get(seq_id, ()) + tuple(entry for _, entry in own)
    return found
