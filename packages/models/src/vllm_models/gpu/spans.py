"""Who attends to what in a step whose sequences are known to the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Chunks(NamedTuple):
    """The pieces of context that sequences with few queries attend to, made by `plan`.

    Attributes:
        items: int32 [C, 8], see `paged_chunks`; those past the last of `ends` are not written.
        ends: int32 [S + 1]: items of the sequences before; the last is how many there are.
        base: Positions of the first chunks.
        max_queries: Sequences with more queries have no chunks.
    """

    items: Tensor
    ends: Tensor
    base: int
    max_queries: int


class GpuSpans(NamedTuple):
    """Sequences of a step, of which each owns consecutive queries: the end of its context.

    Tensors are int32 and may be those of a captured graph, filled anew before each replay. What is
    said of all sequences holds for all replays.

    Attributes:
        rows: [S] of the tables.
        starts: [S + 1] first query of each sequence among the T of the step.
        lengths: [S] context, own queries included.
        tables: [R, N] blocks; those past the end of a context are not read.
        window: Positions a query looks back, its own included; 0 is all.
        max_queries: No sequence has more.
        max_length: No context is longer.
        min_queries: No sequence has fewer.
        chunks: If they are shared by the layers of a step; else each layer makes its own.
    """

    rows: Tensor
    starts: Tensor
    lengths: Tensor
    tables: Tensor
    window: int
    max_queries: int
    max_length: int
    min_queries: int = 1
    chunks: Chunks | None = None
