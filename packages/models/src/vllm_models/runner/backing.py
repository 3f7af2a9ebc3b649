"""Memory behind the KV blocks of a CPU, asked for a little before it is written.

The pool takes memory when it is first written, so that a start is short and a small load takes
little. But the first write of a page waits until the system has found and cleared it, on a virtual
machine until its host has as well: milliseconds for each large page. A thread beside the model's
does that waiting, for the blocks that come next.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

AHEAD = 256 << 20  # bytes that are ready beyond the blocks in use
STEP = 32 << 20  # bytes asked for at once
_POPULATE_WRITE = (
    23  # MADV_POPULATE_WRITE of Linux 5.14: pages become memory, and keep what they hold
)
_PAGE = 4096

Populate = Callable[[int, int], bool]  # address and bytes; False if the system cannot


def populate(address: int, num_bytes: int) -> bool:
    """Make pages memory now; whole pages that hold any of the bytes."""
    if sys.platform != "linux":
        return False
    first = address // _PAGE * _PAGE
    libc = ctypes.CDLL(None)
    size = ctypes.c_size_t(address + num_bytes - first)
    return libc.madvise(ctypes.c_void_p(first), size, _POPULATE_WRITE) == 0


class Backing:
    """Keeps memory ready for the blocks after those in use, which are taken in ascending order.

    Args:
        tensors: [L, B, ...] each, what is kept of all blocks.
        ask: Makes pages memory.
    """

    def __init__(self, tensors: Sequence[Tensor], ask: Populate = populate) -> None:
        self._layers = [layer for tensor in tensors for layer in tensor]  # [B, ...] each
        self._num_blocks = len(self._layers[0])
        bytes_per_block = sum(layer[0].nbytes for layer in self._layers)
        self._ahead = -(-AHEAD // bytes_per_block)
        self._step = -(-STEP // bytes_per_block)
        self._ask = ask
        self._wanted = 0
        self.num_ready = 0  # blocks
        self._change = threading.Lock()
        self.thread: threading.Thread | None = None  # while it is at work

    def reach(self, num_blocks: int) -> None:
        """So many blocks are in use, or about to be."""
        wanted = min(num_blocks + self._ahead, self._num_blocks)
        if wanted < min(self._wanted + self._step, self._num_blocks) or wanted <= self._wanted:
            return
        with self._change:
            self._wanted = wanted
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="kv-backing", daemon=True)
                self.thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                end = min(self.num_ready + self._step, self._wanted)
                if end <= self.num_ready:
                    self.thread = None
                    return
            blocks = slice(self.num_ready, end)
            parts = (layer[blocks] for layer in self._layers)
            is_able = all(self._ask(part.data_ptr(), part.nbytes) for part in parts)
            self.num_ready = end if is_able else self._num_blocks
