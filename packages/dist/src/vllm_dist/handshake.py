"""How two sides prove to each other that they know a secret, without sending it.

Each side sends a fresh nonce; each answers with a keyed digest of both nonces and its own role.
The client proves first, so that a stranger learns nothing about the secret.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from enum import IntEnum

from vllm_traits import BackendError, ConfigError, WireError
from vllm_traits.wire import Kind, decode_blob, encode_blob

from vllm_dist.channel import Channel

NONCE_BYTES = 32
MIN_SECRET_BYTES = 16
MAX_BODY_BYTES = 64  # of a frame before the other side is known
CONTEXT = b"vllm-dist handshake 1"


class Role(IntEnum):
    """Which side of a connection one is: the client owns the engine, the server the backend."""

    CLIENT = 1
    SERVER = 2

    @property
    def other(self) -> Role:
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


def handshake(channel: Channel, secret: bytes, role: Role, timeout_s: float = 5.0) -> None:
    """Prove that this side knows the secret, and that the other one does.

    Args:
        channel: A connection that nothing was sent over yet; left open in every case.
        secret: At least 16 bytes.
        role: Which side this is.
        timeout_s: For the whole handshake, in seconds.

    Raises:
        WireError: The other side is not one of ours, does not know the secret, or repeats what
            it saw elsewhere.
        BackendError: The other side went away, or the time is up.
        ConfigError: The secret is too short.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"A secret has at least {MIN_SECRET_BYTES} bytes, not {len(secret)}.")
    _Handshake(channel, secret, role, time.monotonic() + timeout_s).run()


def accept_channel(listener: socket.socket, secret: bytes, timeout_s: float = 5.0) -> Channel:
    """Wait for a client that knows the secret; connections of strangers are closed.

    Args:
        listener: A listening socket, which stays open.
        secret: At least 16 bytes.
        timeout_s: For each handshake, in seconds; strangers are served one after the other.

    Raises:
        OSError: The listener is closed.
        ConfigError: The secret is too short.
    """
    while True:
        channel = Channel(listener.accept()[0])
        try:
            handshake(channel, secret, Role.SERVER, timeout_s)
        except (WireError, BackendError):
            channel.close()
        except ConfigError:
            channel.close()
            raise
        else:
            return channel


def connect_channel(address: tuple[str, int], secret: bytes, timeout_s: float = 5.0) -> Channel:
    """Connect to a server that knows the secret.

    Args:
        address: Host and port.
        secret: At least 16 bytes.
        timeout_s: For the connection and for the handshake, in seconds.

    Raises:
        OSError: Nobody listens there.
        WireError: The server does not know the secret.
        BackendError: The server closed the connection: it may not accept our secret.
        ConfigError: The secret is too short.
    """
    channel = Channel(socket.create_connection(address, timeout_s))
    try:
        handshake(channel, secret, Role.CLIENT, timeout_s)
    except (WireError, BackendError, ConfigError):
        channel.close()
        raise
    return channel


class _Handshake:
    """One run of the exchange."""

    def __init__(self, channel: Channel, secret: bytes, role: Role, deadline: float) -> None:
        self._channel = channel
        self._secret = secret
        self._role = role
        self._deadline = deadline
        self._nonce = secrets.token_bytes(NONCE_BYTES)

    def run(self) -> None:
        """The client speaks first in both rounds."""
        hello = bytes([self._role]) + self._nonce
        if self._role is Role.CLIENT:
            self._send(Kind.HELLO, hello)
            nonces = self._nonce + self._their_nonce()
            self._send(Kind.PROOF, self._proof(self._role, nonces))
            self._check_proof(nonces)
        else:
            nonces = self._their_nonce() + self._nonce
            self._send(Kind.HELLO, hello)
            self._check_proof(nonces)
            self._send(Kind.PROOF, self._proof(self._role, nonces))

    def _their_nonce(self) -> bytes:
        hello = self._receive(Kind.HELLO)
        if len(hello) != 1 + NONCE_BYTES or hello[0] != self._role.other:
            raise WireError("The other side's hello has another length or the wrong role.")
        return hello[1:]

    def _check_proof(self, nonces: bytes) -> None:
        expected = self._proof(self._role.other, nonces)
        if not hmac.compare_digest(self._receive(Kind.PROOF), expected):
            raise WireError("The other side does not know the secret.")

    def _proof(self, role: Role, nonces: bytes) -> bytes:
        return hmac.digest(self._secret, CONTEXT + bytes([role]) + nonces, "sha256")

    def _send(self, kind: Kind, data: bytes) -> None:
        self._channel.send(encode_blob(kind, data))

    def _receive(self, kind: Kind) -> bytes:
        left = max(self._deadline - time.monotonic(), 0.0)
        return decode_blob(self._channel.receive(left, MAX_BODY_BYTES), kind)
