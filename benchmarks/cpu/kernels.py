"""Linear kernels on the shapes of Qwen3-0.6B, with random weights that no cache holds.

The limit of a call is the longer of the time to read its weights and the time of its products, both
at the rates measured around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import torch
from vllm_models.gguf.types import GgmlType, row_bytes
from vllm_models.native.blocks import PackedBlocks, pack_blocks
from vllm_models.native.dense import PackedDense
from vllm_models.native.library import Library

from benchmarks.cpu.ceilings import Meter
from benchmarks.cpu.rows import Figure, seconds

SHAPES = {"qkv": (4096, 1024), "o": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)}
ROWS = (1, 2, 4, 8, 16, 32, 128, 1024)
WEIGHTS = 160 << 20  # bytes of each kind: several times the last cache
LARGE = 64  # rows; more are bound by products, so fewer weights do


def weights_of(library: Library, kind: str, shape: tuple[int, int]) -> list[PackedDense]:
    """Enough copies of one random weight."""
    outputs, columns = shape
    if kind in ("bf16", "f32"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        matrix = torch.randn(shape).to(dtype)
        return [PackedDense(library, matrix) for _ in range(WEIGHTS // matrix.nbytes + 1)]
    width = row_bytes(GgmlType[kind], columns)
    blocks = torch.randint(0, 60, (outputs, width), dtype=torch.uint8)
    count = WEIGHTS // blocks.nbytes + 1
    return [pack_blocks(library, blocks, kind, columns) for _ in range(count)]


def figures(library: Library, kinds: list[str], rows: list[int]) -> Iterator[Figure]:
    """One row per format, shape and number of rows."""
    meter = Meter(library)
    for kind in kinds:
        for name, shape in SHAPES.items():
            weights = weights_of(library, kind, shape)
            for count in rows:
                yield {"weights": kind, "layer": name, **measured(meter, weights, count)}


def measured(meter: Meter, weights: list[PackedDense] | list[PackedBlocks], rows: int) -> Figure:
    """One number of rows by all weights in turn."""
    first = weights[0]
    used = weights if rows < LARGE else weights[:2]
    x = torch.randn(rows, first.columns).bfloat16()
    out = torch.empty((rows, first.outputs), dtype=torch.bfloat16)
    before = meter.read(3), meter.products(3)
    each = seconds(lambda: [weight.matmul(x, out=out) for weight in used], 5) / len(used)
    after = meter.read(3), meter.products(3)
    read, products = (mean(pair) for pair in zip(before, after, strict=True))
    operations = 2.0 * rows * first.outputs * first.columns
    limit = max(first.nbytes / read, operations / products)
    return {
        "rows": rows,
        "us": each * 1e6,
        "GB/s": first.nbytes / each / 1e9,
        "of read": first.nbytes / each / read,
        "GFLOP/s": operations / each / 1e9,
        "of products": operations / each / products,
        "of limit": limit / each,
    }
