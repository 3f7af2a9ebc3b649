"""Another backend, late and faulty: overlap and recovery can be tested without a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from vllm_traits import (
    EMPTY,
    BackendError,
    BackendInfo,
    Batch,
    BatchOutput,
    BlockStore,
    Chunk,
    InFlight,
    ModelBackend,
)

RowFault = Callable[[int, Chunk], str | None]  # number of the batch, its chunk -> error code


class DelayedBackend:
    """Runs batches of another backend as late as the protocol allows.

    Args:
        inner: The backend that computes.
        delay: A batch runs when so many newer ones were launched, when `done` was asked so often,
            or when its result is read.
        fail_row: Says which rows of a batch are reported as failed, counting batches from 1.
        fail_forward: Numbers of the batches that cannot be launched.
        fail_result: Numbers of the batches whose result raises.
    """

    def __init__(
        self,
        inner: ModelBackend,
        delay: int = 0,
        *,
        fail_row: RowFault | None = None,
        fail_forward: Collection[int] = (),
        fail_result: Collection[int] = (),
    ) -> None:
        self.num_batches = 0
        self.num_faults = 0
        self.num_failed_rows = 0
        self._inner = inner
        self.delay = delay
        self._fail_row = fail_row
        self._fail_forward = fail_forward
        self._fail_result = fail_result
        self._queue: deque[_Late] = deque()
        self._rows: set[int] = set()  # sequences the inner backend has seen start

    @property
    def info(self) -> BackendInfo:
        """The inner backend's limits."""
        return self._inner.info

    @property
    def stores(self) -> Sequence[BlockStore]:
        """The inner backend's stores."""
        return self._inner.stores

    def forward(self, batch: Batch) -> InFlight:
        """Take a batch; older ones may run now.

        Raises:
            BackendError: As told by `fail_forward`; nothing of the batch was applied.
        """
        self.num_batches += 1
        if self.num_batches in self._fail_forward:
            raise self._fault("forward")
        late = _Late(self, batch, self.num_batches)
        self._queue.append(late)
        while len(self._queue) > self.delay + 1:
            self._run_oldest()
        return late

    def close(self) -> None:
        """Close the inner backend."""
        self._inner.close()

    def run_until(self, late: _Late) -> None:
        """Run everything up to a batch, in order."""
        while not late.has_run:
            self._run_oldest()

    def run_due(self) -> None:
        """Run what `delay` no longer holds back."""
        while len(self._queue) > self.delay:
            self._run_oldest()

    def output(self, number: int, batch: Batch, output: BatchOutput) -> BatchOutput:
        """What the engine gets to see of a result.

        Raises:
            BackendError: As told by `fail_result`.
        """
        if number in self._fail_result:
            raise self._fault("result")
        failed: dict[int, str] = {}
        for chunk in batch.chunks:
            code = self._fail_row(number, chunk) if self._fail_row else None
            if code is not None:
                failed[chunk.seq_id] = code
        self.num_failed_rows += len(failed)
        if not failed:
            return output
        kept = {key: value for key, value in output.token_ids.items() if key not in failed}
        return replace(output, token_ids=kept, failed=failed)

    def _fault(self, call: str) -> BackendError:
        self.num_faults += 1
        self._queue.clear()  # whatever was in flight is lost with it
        return BackendError(f"injected into {call}")

    def _run_oldest(self) -> None:
        late = self._queue.popleft()
        batch = late.batch
        known = tuple(seq_id for seq_id in batch.released if seq_id in self._rows)
        self._rows.difference_update(known)
        self._rows.update(start.seq_id for start in batch.starts)
        late.run(self._inner.forward(batch._replace(released=known)))


class _Late:
    """A batch that runs later."""

    def __init__(self, backend: DelayedBackend, batch: Batch, number: int) -> None:
        self.batch = batch
        self._backend = backend
        self._number = number
        self._masks: Mapping[int, bytes] | None = None
        self._inner: InFlight | None = None
        self._num_polls = 0

    @property
    def has_run(self) -> bool:
        return self._inner is not None

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        assert self._masks is None, "sample() was called twice"
        self._masks = dict(masks)
        self._backend.run_due()

    def run(self, inner: InFlight) -> None:
        assert self._masks is not None, "a batch ran before it was sampled"
        inner.sample(self._masks)
        self._inner = inner

    def done(self) -> bool:
        if self._inner is None and self._masks is not None:
            self._num_polls += 1
            if self._num_polls > self._backend.delay:
                self._backend.run_until(self)
        return self._inner is not None

    def result(self) -> BatchOutput:
        assert self._masks is not None, "result() before sample()"
        self._backend.run_until(self)
        assert self._inner is not None, "a batch did not run"
        return self._backend.output(self._number, self.batch, self._inner.result())
