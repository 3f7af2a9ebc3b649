"""Launching everything that follows the logits: edits, winners, and log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from vllm_traits import SamplingParams

from vllm_models.gpu.edits import EditBatch, apply
from vllm_models.gpu.logprobs import score
from vllm_models.gpu.sample import sample
from vllm_models.runner.device.inputs import Targets
from vllm_models.runner.device.rows import DeviceRows
from vllm_models.runner.device.step import Asked, Launched
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.edits import Target


class Sampling:
    """Samples the targets of a step on the device.

    Args:
        rows: State, which keeps what was sampled.
        upload: To the same device.
    """

    def __init__(self, rows: DeviceRows, upload: Upload) -> None:
        self._rows = rows
        self._upload = upload
        self._edited: tuple[tuple[object, ...], EditBatch | None] = ((), None)

    def launch(
        self,
        logits: Tensor,
        targets: Sequence[Target],
        where: Targets,
        masks: Mapping[int, bytes],
        launched: Launched,
    ) -> None:
        """Sample and note in `launched` what is to be read.

        Args:
            logits: [N, V].
            targets: What is sampled in each row.
            where: The same on the device.
            masks: Allowed ids of some sequences, as bits.
            launched: Changed in place.
        """
        asked = [(i, t) for i, t in enumerate(targets) if _params(t).logprobs is not None]
        if asked:
            [sent] = self._upload.send([np.array([i for i, _ in asked], dtype=np.int32)])
            places = sent.long()
            reported = logits[places].float()  # before any change
        logits = self._edited_logits(logits, targets, where, masks)
        winners = sample(logits, where.rows, where.positions, self._rows.sampling)
        launched.token_ids, launched.best = winners
        if asked:
            chosen = winners.token_ids[places]
            num_top = [_params(target).logprobs or 0 for _, target in asked]
            scores = score(reported, chosen, max(num_top))
            ids = [target.seq_id for _, target in asked]
            launched.logprobs.append(Asked(ids, num_top, (chosen, *scores)))

    def _edited_logits(
        self,
        logits: Tensor,
        targets: Sequence[Target],
        where: Targets,
        masks: Mapping[int, bytes],
    ) -> Tensor:
        edited = [(i, t.row.index, t.row.edits) for i, t in enumerate(targets) if t.row.edits]
        masked = {i: masks[t.seq_id] for i, t in enumerate(targets) if t.seq_id in masks}
        if not edited and not masked:
            return logits
        key = tuple(edited)
        if key != self._edited[0]:
            self._edited = (key, EditBatch.of(edited))
        changed = logits.float()  # small biases would be lost in a narrower type
        apply(
            changed,
            self._edited[1],
            where.rows,
            where.positions,
            self._rows.tokens,
            self._rows.num_prompt_tokens,
            masked,
        )
        return changed


def _params(target: Target) -> SamplingParams:
    assert isinstance(target.row.params, SamplingParams)
    return target.row.params
