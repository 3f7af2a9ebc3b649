"""Whole frames over a socket. Knows the header of a frame, not what the body means."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from vllm_traits import BackendError, WireError
from vllm_traits.wire import HEADER_BYTES, MAX_BODY_BYTES, parse_header

SEND_TIMEOUT_S = 30
PIECE_BYTES = 1 << 20  # memory grows with what arrives, not with what a header promises


class ChannelClosed(BackendError):
    """The other side is gone, or took too long."""


class Channel:
    """A connection. Any thread may send; one thread receives.

    Args:
        connection: A connected stream socket; owned by the channel from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A limit for sending alone, which receiving without limit does not touch.
        limit = struct.pack("ll", SEND_TIMEOUT_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, frame: bytes) -> None:
        """Send a whole frame.

        Raises:
            ChannelClosed: The other side is gone, or did not read for 30 seconds.
        """
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError as error:
            self.close()  # half a frame may be out, so nothing can follow
            raise ChannelClosed(f"The connection is lost: {error}.") from None

    def receive(
        self, timeout_s: float | None = None, max_body_bytes: int = MAX_BODY_BYTES
    ) -> bytes:
        """Wait for a whole frame.

        Args:
            timeout_s: For the frame as a whole, in seconds; None waits for ever.
            max_body_bytes: Longest body that is accepted.

        Raises:
            ChannelClosed: The other side closed between two frames, or the time is up.
            WireError: What arrives is not a frame, is too long, or ends in the middle.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        header = self._read(HEADER_BYTES, deadline)
        if not header:
            raise ChannelClosed("The other side closed the connection.")
        if len(header) < HEADER_BYTES:
            raise WireError("The connection ended inside a header.")
        body_bytes = parse_header(bytes(header), max_body_bytes).body_bytes
        body = self._read(body_bytes, deadline)
        if len(body) < body_bytes:
            raise WireError(f"The connection ended after {len(body)} of {body_bytes} bytes.")
        return b"".join((header, body))

    def close(self) -> None:
        """Wake whoever sends or receives, and close. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, num_bytes: int, deadline: float | None) -> bytearray:
        """So many bytes, or fewer if the connection ends."""
        data = bytearray()
        try:
            while len(data) < num_bytes:
                if deadline is not None:
                    self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
                piece = self._socket.recv(min(num_bytes - len(data), PIECE_BYTES))
                if not piece:
                    break
                data += piece
            if deadline is not None:
                self._socket.settimeout(None)
        except OSError as error:
            raise ChannelClosed(f"The connection is lost: {error}.") from None
        return data
