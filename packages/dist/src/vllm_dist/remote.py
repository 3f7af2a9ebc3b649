"""The side of a connection that owns the engine: a backend that sends its batches away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from weakref import WeakValueDictionary

from vllm_traits import (
    EMPTY,
    BackendError,
    BackendInfo,
    Batch,
    BatchOutput,
    BlockStore,
    WireError,
)
from vllm_traits.wire import (
    Kind,
    decode_fault,
    decode_info,
    decode_output,
    encode_batch,
    encode_masks,
    parse_header,
)

from vllm_dist.channel import Channel

logger = logging.getLogger(__name__)


class RemoteBackend:
    """A `ModelBackend` that runs at the other end of a channel.

    It offers no block stores: copies of blocks stay on the other side. Losing the connection fails
    every batch in flight and every later one; there is no way back.

    Args:
        channel: A connection after its handshake; owned by the backend from now on.
        start_timeout_s: How long the other side may take to load its model.
        on_end: Called once, in the receiving thread, when the connection has ended.

    Raises:
        BackendError: The other side did not begin: it failed, closed, or took too long.
        WireError: The other side does not speak the protocol.
    """

    def __init__(
        self,
        channel: Channel,
        start_timeout_s: float = 600.0,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._on_end = on_end
        self._waiting: WeakValueDictionary[int, _RemoteInFlight] = WeakValueDictionary()
        self._guard = threading.Lock()
        self._lost: str | None = None
        self._info = self._receive_info(start_timeout_s)
        self._receiver = threading.Thread(target=self._receive, name="remote", daemon=True)
        self._receiver.start()

    @property
    def info(self) -> BackendInfo:
        """The other side's limits."""
        return self._info

    @property
    def stores(self) -> Sequence[BlockStore]:
        """None."""
        return ()

    def forward(self, batch: Batch) -> _RemoteInFlight:
        """Send a batch; whether it could be launched is known with its result.

        Raises:
            BackendError: The connection is lost.
            WireError: Something in the batch is too large to be encoded; nothing was sent.
        """
        frame = encode_batch(batch)
        launched = _RemoteInFlight(self._channel, batch.step)
        with self._guard:
            if self._lost is not None:
                raise BackendError(self._lost)
            self._waiting[batch.step] = launched
        self._channel.send(frame)
        return launched

    def close(self) -> None:
        """End the connection, upon which the other side ends; waits for the receiving thread."""
        self._channel.close()
        self._receiver.join()

    def _receive_info(self, timeout_s: float) -> BackendInfo:
        try:
            frame = self._channel.receive(timeout_s)
            if parse_header(frame).kind is Kind.FAULT:
                raise BackendError(f"The backend did not start: {decode_fault(frame)}")
            return decode_info(frame)
        except (BackendError, WireError):
            self._channel.close()
            self._on_end()
            raise

    def _receive(self) -> None:
        """Hand out results until the connection ends, then tell everybody."""
        try:
            while True:
                self._hand_out(self._channel.receive())
        except (BackendError, WireError) as error:
            self._lose(f"The connection to the backend is lost: {error}")
        self._channel.close()
        self._on_end()

    def _hand_out(self, frame: bytes) -> None:
        kind, step, _ = parse_header(frame)
        outcome = _outcome(kind, frame)  # a bad frame ends the connection, wanted or not
        with self._guard:
            launched = self._waiting.pop(step, None)
        if launched is not None:
            launched.settle(outcome)

    def _lose(self, message: str) -> None:
        with self._guard:
            self._lost = message
            waiting = list(self._waiting.values())
        for launched in waiting:
            launched.settle(BackendError(message))


def _outcome(kind: Kind, frame: bytes) -> BatchOutput | BackendError:
    if kind is Kind.OUTPUT:
        return decode_output(frame)
    if kind is Kind.FAULT:
        return BackendError(decode_fault(frame))
    raise WireError(f"A server does not send {kind.name}.")


class _RemoteInFlight:
    """A batch at the other side."""

    def __init__(self, channel: Channel, step: int) -> None:
        self._channel = channel
        self._step = step
        self._future: Future[BatchOutput] = Future()

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Send the masks.

        Raises:
            BackendError: The connection is lost.
        """
        self._channel.send(encode_masks(masks, self._step))

    def done(self) -> bool:
        """Whether the result or the loss of it is known."""
        return self._future.done()

    def result(self) -> BatchOutput:
        """Wait for what the other side produced.

        Raises:
            BackendError: The batch failed there, or the connection is lost.
        """
        return self._future.result()

    def settle(self, outcome: BatchOutput | BackendError) -> None:
        """The answer has come, once."""
        if isinstance(outcome, BackendError):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
