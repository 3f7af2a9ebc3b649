"""The inputs of a decode step in C, always in the same memory, so that the step can be repeated."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_models.native.attention import Spans
from vllm_models.native.library import Library


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tokens", "tables")),
        *((name, ctypes.c_int64) for name in ("capacity", "width", "block_size", "count")),
        *((name, ctypes.c_void_p) for name in ("places", "token_ids", "positions", "slots")),
        ("spans", ctypes.c_void_p),
    )


class DecodeInputs:
    """Of a step with one token for each of some sequences.

    Args:
        library: The kernels.
        tokens: [rows, capacity] int64 every sequence's tokens.
        tables: [rows, N] int64 every sequence's blocks.
        block_size: Positions per block.
        count: Sequences of the step.

    Attributes:
        token_ids: [count] int64.
        positions: [count] int64.
        slots: [count] int64: block * block_size + offset.
        spans: [count, 3] int64, see `Spans`.
    """

    def __init__(
        self, library: Library, tokens: Tensor, tables: Tensor, block_size: int, count: int
    ) -> None:
        self.token_ids, self.positions, self.slots = torch.zeros(3, count, dtype=torch.int64)
        self.spans = torch.zeros(count, 3, dtype=torch.int64)
        self._tables = tables
        self._places = (ctypes.c_int64 * (2 * count))()
        self._library = library
        self._step = _Step(
            *(tokens.data_ptr(), tables.data_ptr()),
            *(tokens.shape[1], tables.shape[1], block_size, count),
            ctypes.addressof(self._places),
            *(t.data_ptr() for t in (self.token_ids, self.positions, self.slots, self.spans)),
        )

    def seen_from(self, window: int) -> Spans:
        """Who attends to what in layers of a window."""
        return Spans(self.spans, self._tables, window)

    def place(self, places: Sequence[int]) -> None:
        """Say whose turn it is: row and position of each sequence, one after the other."""
        self._places[:] = places

    def gather(self) -> None:
        """Fill the tensors."""
        self._library.step_inputs(ctypes.byref(self._step))
