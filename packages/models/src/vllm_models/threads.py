"""How long idle threads wait awake. Without torch, which reads this when it is first imported."""

from __future__ import annotations

import os

SPIN_COUNT = 2000  # turns of a loop: some tens of microseconds


def wait_briefly() -> None:
    """Let idle workers look for work for a moment before they sleep, unless the operator chose.

    The parallel parts of a step follow each other within microseconds, and waking a sleeper costs
    more than many of them: with sleepers a decode step of a quantized model takes half as long
    again. Spinning for ever, which is usual, starves other threads, and on a busy machine the
    workers each other, many times over.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
