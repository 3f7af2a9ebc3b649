"""The side of a connection that owns the backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, Queue

from vllm_traits import BackendError, Batch, InFlight, ModelBackend, WireError
from vllm_traits.wire import (
    Kind,
    decode_batch,
    decode_masks,
    encode_fault,
    encode_info,
    encode_output,
    parse_header,
)

from vllm_dist.channel import Channel

logger = logging.getLogger(__name__)

POLL_S = 0.0002  # how often a batch in flight is asked whether it is done
MAX_WAITING_FRAMES = 64
MAX_UNSAMPLED = 8  # an engine has two at most; after a fault it forgets them


class Inbox:
    """Reads frames in a thread of its own, so that the end of a connection is noticed at once.

    Args:
        channel: Where frames come from.
        on_end: Called in that thread when no more will come.
    """

    def __init__(self, channel: Channel, on_end: Callable[[], None] = lambda: None) -> None:
        self.frames: Queue[bytes | None] = Queue(MAX_WAITING_FRAMES)
        self._channel = channel
        self._on_end = on_end
        self._thread = threading.Thread(target=self._read, name="inbox", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            while True:
                self.frames.put(self._channel.receive())
        except (BackendError, WireError) as error:
            logger.info("the connection ends: %s", error)
        self._on_end()
        self.frames.put(None)


def serve_backend(backend: ModelBackend, channel: Channel, inbox: Inbox | None = None) -> None:
    """Run the batches of a connection until it ends; then close the backend and the channel.

    Every call to the backend is made by this thread, in the order of the frames. Results are sent
    as they become known, so that the next batch is launched while one is in flight. The backend's
    block stores are not offered to the other side.

    Args:
        backend: Runs the batches.
        channel: A connection after its handshake.
        inbox: What reads the channel, if that has begun already.
    """
    try:
        _Service(backend, channel, inbox or Inbox(channel)).run()
    except (BackendError, WireError) as error:
        logger.info("the connection ends: %s", error)
    finally:
        channel.close()
        backend.close()


class _Service:
    """Batches of one connection by step: launched ones, and sampled ones in order."""

    def __init__(self, backend: ModelBackend, channel: Channel, inbox: Inbox) -> None:
        self._backend = backend
        self._channel = channel
        self._inbox = inbox
        self._unsampled: dict[int, InFlight] = {}
        self._sampled: dict[int, InFlight] = {}

    def run(self) -> None:
        """Frames come first: launching is urgent, answering is not."""
        self._channel.send(encode_info(self._backend.info))
        while True:
            try:
                frame = self._inbox.frames.get(timeout=POLL_S if self._sampled else None)
            except Empty:
                self._answer_known()
                continue
            if frame is None:
                return
            self._take(frame)
            if self._inbox.frames.empty():
                self._answer_known()

    def _take(self, frame: bytes) -> None:
        kind, step, _ = parse_header(frame)
        if kind is Kind.BATCH:
            self._attempt(step, partial(self._launch, decode_batch(frame)))
        elif kind is Kind.MASKS:
            self._attempt(step, partial(self._sample, step, decode_masks(frame)))
        else:
            raise WireError(f"A client does not send {kind.name}.")

    def _launch(self, batch: Batch) -> None:
        self._unsampled[batch.step] = self._backend.forward(batch)
        if len(self._unsampled) > MAX_UNSAMPLED:
            del self._unsampled[next(iter(self._unsampled))]

    def _sample(self, step: int, masks: dict[int, bytes]) -> None:
        launched = self._unsampled.pop(step, None)
        if launched is not None:  # else its launch failed, which was reported
            launched.sample(masks)
            self._sampled[step] = launched

    def _answer_known(self) -> None:
        """Send results in order, up to the first that is not known yet."""
        while self._sampled:
            step = next(iter(self._sampled))
            self._attempt(step, partial(self._result, step))
            if step in self._sampled:
                return

    def _result(self, step: int) -> bytes | None:
        launched = self._sampled[step]
        if not launched.done():
            return None
        frame = encode_output(launched.result(), step)
        del self._sampled[step]
        return frame

    def _attempt(self, step: int, call: Callable[[], bytes | None]) -> None:
        """Call the backend and send what comes of it; an error fails this batch and no other."""
        try:
            frame = call()
        except Exception as error:
            logger.exception("batch %d failed", step)
            self._unsampled.pop(step, None)
            self._sampled.pop(step, None)
            frame = encode_fault(f"{type(error).__name__}: {error}", step)
        if frame is not None:
            self._channel.send(frame)
