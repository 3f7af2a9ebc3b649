"""One step of a model: rows, inputs, one forward pass, then tokens and vectors."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor
from vllm_traits import (
    EMPTY,
    Batch,
    BatchOutput,
    Done,
    InFlight,
    PoolingParams,
    SamplingParams,
    TokenLogprobs,
)

from vllm_models.components.decoder import Decoder
from vllm_models.runner import pool
from vllm_models.runner.cost import CostModel
from vllm_models.runner.inputs import Inputs, Work, place_chunks, token_ids_and_context
from vllm_models.runner.kv import KVPool
from vllm_models.runner.logprobs import describe
from vllm_models.runner.recorded import RecordedSteps
from vllm_models.runner.rows import Row, Rows
from vllm_models.runner.sample import NON_FINITE, Sampled, sample

MAX_SCORES = 1 << 24  # logits of prompt positions held at once


class Runner:
    """Runs batches of one model on one device.

    Args:
        model: With its weights.
        kv: The pool.
        rows: Rows over the same pool.
        cost: What steps cost; None where the time of a step is not the device's.
        recorded: Repeats decode steps; None walks through the layers every time.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVPool,
        rows: Rows,
        cost: CostModel | None = None,
        recorded: RecordedSteps | None = None,
    ) -> None:
        self._model = model
        self._recorded = recorded
        self._kv = kv
        self._rows = rows
        self._cost = cost

    @property
    def model(self) -> Decoder:
        """As given."""
        return self._model

    @torch.inference_mode()
    def forward(self, batch: Batch) -> InFlight:
        """Compute a batch; sampling waits only if a chunk is masked."""
        start = time.perf_counter()
        self._rows.apply(batch)
        inputs = place_chunks(batch.chunks, self._rows)
        step = Step(self._rows, inputs, self._cost)
        if self._recorded is not None and _is_decode(inputs, self._recorded):
            hidden = self._recorded.forward(inputs.places)
            step.logits = self._model.logits(hidden).float()  # [N, V]
        elif inputs.works:
            hidden = self._model(*token_ids_and_context(inputs.works, self._rows, self._kv))
            step.prompt_logprobs = self._prompt_logprobs(inputs, hidden)
            step.embeddings = _pool(inputs, hidden)
            if inputs.targets:
                places = torch.tensor(inputs.target_places, device=hidden.device)
                step.logits = self._model.logits(hidden[places]).float()  # [N, V]
        step.seconds = time.perf_counter() - start
        if any(chunk.masked for chunk in batch.chunks):
            step.keep_logits()
            return step
        step.make_tokens(EMPTY)
        return Done(step.result())

    def _prompt_logprobs(
        self, inputs: Inputs, hidden: Tensor
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """Scores of the prompt tokens that follow the computed positions, for those who asked."""
        found: dict[int, tuple[TokenLogprobs, ...]] = {}
        for work in inputs.works:
            params = work.row.params
            if isinstance(params, SamplingParams) and params.prompt_logprobs is not None:
                scored = self._score(work, hidden[work.places], params.prompt_logprobs)
                found[work.chunk.seq_id] = scored
        return found

    def _score(self, work: Work, hidden: Tensor, num_top: int) -> tuple[TokenLogprobs, ...]:
        end = min(work.end, work.row.num_prompt_tokens - 1)
        following = self._rows.tokens[work.row.index, work.start + 1 : end + 1].tolist()
        size = max(1, MAX_SCORES // self._rows.vocab_size)
        scored: list[TokenLogprobs] = []
        for first in range(0, len(following), size):
            ids = following[first : first + size]
            logits = self._model.logits(hidden[first : first + len(ids)]).float()
            scored += describe(logits.log_softmax(-1), ids, [num_top] * len(ids))
        return tuple(scored)


def _is_decode(inputs: Inputs, recorded: RecordedSteps) -> bool:
    """Whether a step samples after one token of every sequence, does nothing else, and can be
    repeated."""
    works = inputs.works
    if not works or len(inputs.targets) != len(works) or not recorded.can_run(len(works)):
        return False
    return all(
        work.chunk.num_tokens == 1
        and isinstance(work.row.params, SamplingParams)
        and work.row.params.prompt_logprobs is None
        for work in works
    )


def _pool(inputs: Inputs, hidden: Tensor) -> dict[int, tuple[float, ...]]:
    """Feed the pooling sequences; vectors of those whose last chunk this was."""
    vectors: dict[int, tuple[float, ...]] = {}
    for work in inputs.works:
        row, chunk = work.row, work.chunk
        if not isinstance(row.params, PoolingParams):
            continue
        pool.take_in(row, hidden[work.places], work.start)
        if chunk.sample and row.failure is None:
            vectors[chunk.seq_id] = pool.read(pool.finish(row))
            row.failure = None if vectors[chunk.seq_id] else NON_FINITE
        if row.failure is not None:
            vectors.pop(chunk.seq_id, None)
            inputs.failed[chunk.seq_id] = row.failure
    return vectors


class Step:
    """A batch that was computed; `sample` makes its tokens, exactly once.

    Attributes:
        logits: [N, V] of the targets; None if nothing is to be sampled.
        prompt_logprobs: By sequence.
        embeddings: By sequence.
        seconds: Spent on it so far.
    """

    def __init__(self, rows: Rows, inputs: Inputs, cost: CostModel | None) -> None:
        self.logits: Tensor | None = None
        self.prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        self.embeddings: dict[int, tuple[float, ...]] = {}
        self.seconds = 0.0
        self._rows = rows
        self._inputs = inputs
        self._cost = cost
        self._output: BatchOutput | None = None

    def keep_logits(self) -> None:
        """Sampling comes later, when another step may have been computed."""
        if self.logits is not None:
            self.logits = self.logits.clone()

    @torch.inference_mode()
    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Sample under the masks, verify drafts, and keep what was sampled."""
        self.make_tokens(masks)

    def make_tokens(self, masks: Mapping[int, bytes]) -> None:
        """The same within a step that computes, which has told torch what it needs to know."""
        assert self._output is None, "sample() was called twice"
        start = time.perf_counter()
        token_ids: dict[int, tuple[int, ...]] = {}
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        if self.logits is not None:
            targets = self._inputs.targets
            sampled = sample(self.logits, targets, self._rows.tokens, masks)
            self._accept(sampled, token_ids, logprobs)
        failed = self._inputs.failed
        self.seconds += time.perf_counter() - start
        self._output = BatchOutput(
            token_ids,
            logprobs,
            {i: entry for i, entry in self.prompt_logprobs.items() if i not in failed},
            self.embeddings,
            failed,
            None if self._cost is None else self._cost.of(self._inputs, self.seconds),
        )

    def _accept(
        self,
        sampled: Sampled,
        token_ids: dict[int, tuple[int, ...]],
        logprobs: dict[int, tuple[TokenLogprobs, ...]],
    ) -> None:
        """Per sequence: tokens up to the first that differs from its draft, or a failure."""
        targets = self._inputs.targets
        written: list[tuple[int, int, int]] = []
        first = 0
        for work in self._inputs.works:
            chunk, row = work.chunk, work.row
            if first == len(targets) or targets[first].row is not row:
                continue
            count = _num_right(sampled.token_ids, first, chunk.draft_ids) + 1
            places = range(first, first + count)
            code = next((sampled.failures[i] for i in places if i in sampled.failures), None)
            if code is not None:
                self._fail(row, chunk.seq_id, code)
            else:
                tokens = sampled.token_ids[first : first + count]
                token_ids[chunk.seq_id] = tuple(tokens)
                if first in sampled.logprobs:
                    logprobs[chunk.seq_id] = tuple(sampled.logprobs[i] for i in places)
                row.length = targets[first].length + count
                row.computed = work.end - chunk.num_drafts + count - 1
                placed = enumerate(tokens, row.length - count)
                written += [(row.index, position, token) for position, token in placed]
            first += 1 + chunk.num_drafts
        self._rows.write_sampled(written)

    def _fail(self, row: Row, seq_id: int, code: str) -> None:
        row.failure = code
        self._inputs.failed[seq_id] = code
        self._rows.taint(row)

    def done(self) -> bool:
        """Whether `sample` was called."""
        return self._output is not None

    def result(self) -> BatchOutput:
        """What the batch produced."""
        assert self._output is not None, "result() before sample()"
        return self._output


def _num_right(token_ids: list[int], first: int, draft_ids: tuple[int, ...]) -> int:
    """How many drafts equal what was sampled in their place, up to the first that does not."""
    right = 0
    while right < len(draft_ids) and token_ids[first + right] == draft_ids[right]:
        right += 1
    return right
