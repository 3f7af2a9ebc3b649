"""Says how Triton's kernels run before anything imports Triton, as transformers does."""

from __future__ import annotations

import os
from pathlib import Path

if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # on the CPU; read when Triton is imported
