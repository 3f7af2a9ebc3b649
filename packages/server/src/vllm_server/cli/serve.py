"""`vllm-lite serve` and `vllm-lite-server`: the HTTP server, until a signal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser
from vllm_server.listen import open_socket
from vllm_server.parent_death import follow_launcher


def run(argv: Sequence[str]) -> int:
    """Bind first, so that a port in use is known before anything is loaded."""
    parser = FlagParser("serve", "Serve the OpenAI-compatible API.")
    parser.add_argument("--server", action="store_true", help="Same as the command serve.")
    _, configuration = settings.read(parser, argv)
    follow_launcher()
    with open_socket(configuration.settings.server) as listener:
        from vllm_server.serve import serve

        code = serve(configuration.settings, listener)
    _leave(code)
    return code


def _leave(code: int) -> None:
    """End at once: a thread that still loads weights must not hold up the exit or crash in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
