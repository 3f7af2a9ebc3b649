"""What a fixed order costs: our kernels against torch's fastest, which may sum in another order for
every shape.

Both run in turn (A B A B) in this process on the same numbers, each layer of Qwen3-0.6B with more
copies of its weight than caches hold: products as oneDNN packs them for itself, attention as
`scaled_dot_product_attention` over contiguous keys, which spares it the blocks that ours follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm_models.native.attention import Spans, attend, block_shapes
from vllm_models.native.dense import PackedDense
from vllm_models.native.library import Library

from benchmarks.cpu.kernels import SHAPES
from benchmarks.cpu.rows import Figure

ROWS = (1, 8, 32, 512)
ROUNDS = 21
WEIGHTS = 96 << 20  # bytes of each side
PROMPT = 64  # rows; from here on they are one sequence's, below it one of each
CONTEXT = 512
HEADS, KV_HEADS, DIM, BLOCK = 16, 8, 128, 16

Run = Callable[[], object]
T = TypeVar("T")


class Pair(NamedTuple):
    """The same work in both orders."""

    fixed: Run
    fastest: Run


def figures(library: Library, rows: list[int]) -> Iterator[Figure]:
    """One row per kernel and number of rows, then each number of rows as a whole layer."""
    totals: dict[int, list[tuple[float, float]]] = {}
    for name, shape in SHAPES.items():
        for count, pair in _products(library, shape, rows):
            totals.setdefault(count, []).append(_seconds(pair))
            yield _figure(name, count, *totals[count][-1])
    for count in rows:
        totals[count].append(_seconds(_attention(library, count)))
        yield _figure("attention", count, *totals[count][-1])
    for count in rows:
        fixed, fastest = (sum(side) for side in zip(*totals[count], strict=True))
        yield _figure("layer", count, fixed, fastest)


def _figure(kernel: str, rows: int, fixed: float, fastest: float) -> Figure:
    return {
        "kernel": kernel,
        "rows": rows,
        "fixed us": fixed * 1e6,
        "fastest us": fastest * 1e6,
        "cost of the order": fixed / fastest - 1,
    }


def _seconds(pair: Pair) -> tuple[float, float]:
    """Medians of both, in turn, after one of each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        for run, taken in zip(pair, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return median(times[0][1:]), median(times[1][1:])


def _products(
    library: Library, shape: tuple[int, int], rows: list[int]
) -> Iterator[tuple[int, Pair]]:
    """One product of each number of rows; the next one is by the next copy of the weight."""
    matrix = torch.randn(shape).bfloat16()
    copies = WEIGHTS // matrix.nbytes + 1
    packed = [PackedDense(library, matrix) for _ in range(copies)]
    for count in rows:
        x = torch.randn(count, shape[1]).bfloat16()
        reordered = [_reordered(matrix, count) for _ in range(copies)]
        ours, theirs = _in_turn(packed), _in_turn(reordered)
        yield (
            count,
            Pair(
                lambda x=x, ours=ours: ours().matmul(x),
                lambda x=x, theirs=theirs: _linear(x, theirs()),
            ),
        )


def _reordered(matrix: Tensor, rows: int) -> Tensor:
    """As oneDNN wants it for this number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix, rows)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _in_turn(copies: list[T]) -> Callable[[], T]:
    """One after the other, for ever."""
    state = [0]

    def following() -> T:
        state[0] = (state[0] + 1) % len(copies)
        return copies[state[0]]

    return following


def _attention(library: Library, rows: int) -> Pair:
    """Decodes of many sequences, or the prompt of one."""
    is_prompt = rows >= PROMPT
    sequences, queries = (1, rows) if is_prompt else (rows, 1)
    length = rows if is_prompt else CONTEXT
    num_blocks = -(-length // BLOCK)
    shapes = block_shapes(BLOCK, KV_HEADS, DIM, DIM, torch.bfloat16)
    keys, values = (
        (torch.randn(sequences * num_blocks, *shape).bfloat16(), None) for shape in shapes
    )
    spans = torch.tensor([(row, queries, length) for row in range(sequences)])
    tables = torch.arange(sequences * num_blocks).view(sequences, num_blocks)
    q = torch.randn(rows, HEADS, DIM).bfloat16()
    k, v = (torch.randn(sequences, KV_HEADS, length, DIM).bfloat16() for _ in range(2))
    folded = q.view(-1, KV_HEADS, HEADS // KV_HEADS, DIM)
    if is_prompt:  # kv heads stand in the place of sequences, and query heads share them
        shared = (KV_HEADS, HEADS // KV_HEADS, length, DIM)
        folded = q.transpose(0, 1).reshape(shared)
        k, v = (x[0, :, None].expand(shared) for x in (k, v))
    return Pair(
        lambda: attend(library, q, keys, values, Spans(spans, tables, 0), DIM**-0.5),
        lambda: F.scaled_dot_product_attention(folded, k, v, is_causal=is_prompt),
    )
