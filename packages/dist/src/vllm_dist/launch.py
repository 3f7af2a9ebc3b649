"""A backend in a child process: it ends when its parent does, and leaves nothing behind."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys

from vllm_traits import BackendError, WireError

from vllm_dist.channel import Channel
from vllm_dist.handshake import Role, handshake
from vllm_dist.remote import RemoteBackend

STOP_TIMEOUT_S = 5.0
SECRET_BYTES = 32
HANDSHAKE_TIMEOUT_S = 60.0  # an interpreter on a busy machine takes its time to start


def launch_backend(
    factory: str, args: tuple[str, ...] = (), start_timeout_s: float = 600.0
) -> RemoteBackend:
    """Start a child process that makes a backend, and talk to it over a pair of sockets.

    The secret of the handshake goes through the child's standard input, where no list of
    processes shows it. The child is in a session of its own: an interrupt from the keyboard is the
    parent's to handle.

    Args:
        factory: "module:function"; called in the child, returns a `ModelBackend`.
        args: Its arguments.
        start_timeout_s: How long the factory may take.

    Raises:
        BackendError: The child or its factory failed, or took too long.
        WireError: The child does not speak the protocol.
    """
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    secret = secrets.token_bytes(SECRET_BYTES)
    with theirs:
        process = _start(theirs, factory, args)
    try:
        process.send_secret(secret)
        handshake(channel, secret, Role.CLIENT, HANDSHAKE_TIMEOUT_S)
    except (BackendError, WireError):
        channel.close()
        process.stop()
        raise
    return RemoteBackend(channel, start_timeout_s, on_end=process.stop)


class _Child:
    """A process that was started and must be waited for."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def send_secret(self, secret: bytes) -> None:
        """Write the secret; a child that is gone already is noticed by the handshake."""
        stdin = self._process.stdin
        if stdin is not None:
            try:
                stdin.write(secret)
                stdin.close()
            except BrokenPipeError as error:
                raise BackendError("The child process ended at once.") from error

    def stop(self) -> None:
        """Wait for the end of a child whose connection has ended; kill it if it hangs."""
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _start(theirs: socket.socket, factory: str, args: tuple[str, ...]) -> _Child:
    command = [sys.executable, "-P", "-m", "vllm_dist.child", str(theirs.fileno()), factory, *args]
    return _Child(
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    )
