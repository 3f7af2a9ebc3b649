"""Entry point of a child process: `python -m vllm_dist.child FD MODULE:FUNCTION [ARGUMENT ...]`.

FD is a connected socket that was inherited; the secret of the handshake comes by standard input.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

from vllm_traits import BackendError, ModelBackend, WireError
from vllm_traits.wire import encode_fault

from vllm_dist.channel import Channel
from vllm_dist.handshake import Role, handshake
from vllm_dist.serve import Inbox, serve_backend

logger = logging.getLogger(__name__)

GRACE_S = 3.0  # to finish a step and close, once the parent is gone


def make_backend(factory: str, args: Sequence[str]) -> ModelBackend:
    """Call "module:function" with arguments."""
    module, _, function = factory.partition(":")
    return getattr(importlib.import_module(module), function)(*args)


def end_soon() -> None:
    """End the process even if a step or the loading of a model hangs."""
    timer = threading.Timer(GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main(arguments: Sequence[str]) -> int:
    """Serve the parent until the connection ends; returns the exit code."""
    fd, factory, *args = arguments
    channel = Channel(socket.socket(fileno=int(fd)))
    try:
        handshake(channel, sys.stdin.buffer.read(), Role.SERVER)
    except (BackendError, WireError):
        logger.exception("the handshake failed")
        return 1
    inbox = Inbox(channel, on_end=end_soon)
    try:
        backend = make_backend(factory, args)
    except Exception as error:
        logger.exception("%s failed", factory)
        channel.send(encode_fault(f"{type(error).__name__}: {error}"))
        channel.close()
        return 1
    serve_backend(backend, channel, inbox)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
