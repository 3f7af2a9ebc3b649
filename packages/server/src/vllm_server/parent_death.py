"""Ends with the launcher that would otherwise leave this process behind.

`hatch run` does not pass SIGTERM on; on Linux the kernel tells a child when its parent is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def follow_launcher() -> bool:
    """Ask for SIGTERM at the parent's death if the parent is hatch; whether that was done."""
    parent = os.getppid()
    if not sys.platform.startswith("linux") or not _is_hatch(parent):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def _is_hatch(pid: int) -> bool:
    """Whether a process runs a program or script called hatch."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(os.path.basename(word) == b"hatch" for word in words[:3])
