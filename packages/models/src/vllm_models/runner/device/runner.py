"""Batches of one model, launched without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from vllm_traits import Batch, InFlight, PoolingParams, SamplingParams

from vllm_models.components.decoder import Decoder
from vllm_models.gpu.logprobs import score
from vllm_models.gpu.step_inputs import keep_sampled
from vllm_models.runner import pool
from vllm_models.runner.cost import CostModel
from vllm_models.runner.device.decode import DecodeSteps, Scored
from vllm_models.runner.device.fetch import Timer
from vllm_models.runner.device.inputs import Bounds, StepInputs, Targets, send_step
from vllm_models.runner.device.sampling import Sampling
from vllm_models.runner.device.step import Asked, DeviceStep, Launched
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.inputs import Inputs, Work, place_chunks
from vllm_models.runner.runner import MAX_SCORES

Launch = Callable[[Mapping[int, bytes]], Launched]


class DeviceRunner:
    """Runs batches of one model on a device with kernels of its own.

    Args:
        model: With its weights.
        inputs: Makes the inputs of its steps.
        cost: What steps cost.
        decode: Repeats decode steps; None walks through the layers every time.
    """

    def __init__(
        self,
        model: Decoder,
        inputs: StepInputs,
        cost: CostModel,
        decode: DecodeSteps | None = None,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._rows = rows = inputs.rows
        self._cost = cost
        self._decode = decode
        self._upload = Upload(rows.device)
        self._sampling = Sampling(rows, self._upload)
        self._drafted: DeviceStep | None = None  # whose right drafts are not counted yet

    @property
    def model(self) -> Decoder:
        """As given."""
        return self._model

    @torch.inference_mode()
    def forward(self, batch: Batch) -> InFlight:
        """Launch a batch; sampling waits only if a chunk is masked."""
        if self._drafted is not None:
            self._drafted.result()
            self._drafted = None
        self._rows.send(self._upload)  # what a batch that failed has left behind
        self._rows.apply(batch)
        inputs = place_chunks(batch.chunks, self._rows)
        self._rows.send(self._upload)
        timer = Timer(self._rows.device)
        launch = self._launch(inputs)
        step = DeviceStep(inputs, launch, self._cost.of, timer)
        if not any(chunk.masked for chunk in batch.chunks):
            step.sample()
        if any(chunk.num_drafts for chunk in batch.chunks):
            self._drafted = step
        return step

    def _launch(self, inputs: Inputs) -> Launch:
        """Compute the logits of a step; what is returned samples under some masks."""
        if not inputs.works:
            return lambda masks: Launched()
        if self._decode is not None and _is_plain_decode(inputs, self._decode):
            scored = self._decode.forward(inputs, self._upload)
            return partial(self._sample_decode, self._decode, inputs, scored)
        sequences, targets = send_step(inputs, self._upload)
        token_ids, ctx, _ = self._inputs.make(sequences, _bounds(inputs.works))
        hidden = self._model(token_ids, ctx)  # [T, M]
        launched = Launched(
            prompt_logprobs=self._prompt_logprobs(inputs, hidden),
            vectors=_pool(inputs, hidden),
        )
        logits = self._model.logits(hidden[targets.places]) if inputs.targets else None  # [N, V]
        return partial(self._sample, inputs, logits, targets, launched)

    def _sample(
        self,
        inputs: Inputs,
        logits: Tensor | None,
        targets: Targets,
        launched: Launched,
        masks: Mapping[int, bytes],
    ) -> Launched:
        if logits is None:
            return launched
        self._sampling.launch(logits, inputs.targets, targets, masks, launched)
        assert launched.token_ids is not None
        still = torch.zeros_like(targets.rows)
        keep_sampled(
            self._rows.tokens, targets.rows, targets.positions, launched.token_ids, still, still
        )
        return launched

    def _sample_decode(
        self, decode: DecodeSteps, inputs: Inputs, scored: Scored, masks: Mapping[int, bytes]
    ) -> Launched:
        if not masks and not any(_has_wishes(work) for work in inputs.works):
            return Launched(*decode.sample(inputs))
        count, launched = len(inputs.works), Launched()
        targets = decode.targets(count, scored.positions)
        logits = scored.logits[:count]
        self._sampling.launch(logits, inputs.targets, targets, masks, launched)
        assert launched.token_ids is not None
        decode.keep(inputs, scored.positions, launched.token_ids)
        return launched

    def _prompt_logprobs(self, inputs: Inputs, hidden: Tensor) -> list[Asked]:
        """Scores of the prompt tokens that follow the computed positions, for those who asked."""
        found: list[Asked] = []
        for work in inputs.works:
            params = work.row.params
            if not isinstance(params, SamplingParams) or params.prompt_logprobs is None:
                continue
            end = min(work.end, work.row.num_prompt_tokens - 1)
            following = self._rows.tokens[work.row.index, work.start + 1 : end + 1].long()
            size = max(1, MAX_SCORES // self._rows.vocab_size)
            own = hidden[work.places]
            for first in range(0, len(following), size):
                ids = following[first : first + size]
                logits = self._model.logits(own[first : first + len(ids)])
                scores = score(logits.float(), ids, params.prompt_logprobs)
                seq_ids = [work.chunk.seq_id] * len(ids)
                found.append(Asked(seq_ids, [params.prompt_logprobs] * len(ids), (ids, *scores)))
        return found


def _bounds(works: list[Work]) -> Bounds:
    counts = [work.chunk.num_tokens for work in works]
    return Bounds(min(counts), max(counts), max(work.end for work in works))


def _is_plain_decode(inputs: Inputs, decode: DecodeSteps) -> bool:
    """Whether a step computes and samples one token of every sequence, and there is a bucket."""
    if len(inputs.targets) != len(inputs.works) or decode.bucket_of(len(inputs.works)) is None:
        return False
    return all(work.chunk.num_tokens == 1 and not _scores_prompt(work) for work in inputs.works)


def _scores_prompt(work: Work) -> bool:
    params = work.row.params
    return isinstance(params, SamplingParams) and params.prompt_logprobs is not None


def _has_wishes(work: Work) -> bool:
    """Whether logits are edited or reported."""
    params = work.row.params
    assert isinstance(params, SamplingParams)
    return work.row.edits is not None or params.logprobs is not None


def _pool(inputs: Inputs, hidden: Tensor) -> dict[int, Tensor]:
    """Feed the pooling sequences; vectors of those whose last chunk this was."""
    vectors: dict[int, Tensor] = {}
    for work in inputs.works:
        row, chunk = work.row, work.chunk
        if not isinstance(row.params, PoolingParams):
            continue
        pool.take_in(row, hidden[work.places], work.start)
        if row.failure is not None:
            inputs.failed[chunk.seq_id] = row.failure
        elif chunk.sample:
            vectors[chunk.seq_id] = pool.finish(row)
    return vectors
