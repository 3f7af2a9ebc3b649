"""Paged attention and KV writes in C against the textbook form, on every class of this machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from vllm_models.kernels.kv_side import KVSide, quantize
from vllm_models.native.attention import Spans, attend, block_shapes, fits, write_kv
from vllm_models.native.library import Library, load
from vllm_models.native.processor import runnable

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=runnable())
def library(request: pytest.FixtureRequest) -> Library:
    return load(request.param)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Shape(NamedTuple):
    dtype: torch.dtype
    num_kv_heads: int
    group: int
    dim: int
    value_dim: int
    block_size: int
    spans: tuple[tuple[int, int], ...]  # queries, context length
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    is_int8: bool = False


SHAPES = {
    "one-decode": Shape(BF16, 1, 1, 64, 64, 16, ((1, 1),)),
    "decodes": Shape(BF16, 2, 2, 128, 128, 16, ((1, 9), (1, 300), (1, 1), (1, 517))),
    "decodes-f32": Shape(F32, 2, 2, 64, 64, 16, ((1, 9), (1, 300), (1, 1), (1, 517))),
    "decodes-wide-group": Shape(BF16, 1, 20, 64, 64, 32, ((1, 257), (2, 40))),
    "decodes-group-of-eight": Shape(BF16, 2, 8, 112, 112, 32, ((1, 700), (3, 290))),
    "prompt": Shape(BF16, 2, 3, 96, 96, 16, ((70, 70),)),
    "prompt-f32": Shape(F32, 1, 8, 80, 80, 64, ((70, 70),)),
    "chunk-of-a-prompt": Shape(F32, 2, 2, 64, 64, 16, ((37, 600), (5, 261))),
    "mixed": Shape(BF16, 3, 5, 48, 48, 32, ((1, 33), (19, 19), (4, 290), (1, 1))),
    "window": Shape(F32, 2, 2, 64, 64, 16, ((1, 600), (40, 300), (9, 9)), window=21),
    "window-of-chunks": Shape(BF16, 1, 4, 64, 64, 16, ((1, 1200), (50, 900)), window=512),
    "soft-cap": Shape(F32, 2, 2, 64, 64, 16, ((1, 300), (20, 40)), soft_cap=5.0),
    "sinks": Shape(F32, 2, 2, 64, 64, 16, ((1, 300), (20, 40)), has_sinks=True),
    "narrow-values": Shape(F32, 1, 4, 576, 512, 16, ((1, 300), (3, 40))),
    "narrow-values-bf16": Shape(BF16, 2, 2, 192, 128, 16, ((1, 300), (17, 40))),
}
SHAPES |= {f"{name}-int8": shape._replace(is_int8=True) for name, shape in SHAPES.items()}


class Case(NamedTuple):
    q: Tensor
    keys: Tensor
    values: Tensor
    packed: tuple[KVSide, KVSide]
    tables: Tensor
    sinks: Tensor | None


def make(library: Library, shape: Shape) -> Case:
    """Random KV in shuffled blocks; what no table names is poisoned."""
    torch.manual_seed(0)
    rng = random.Random(0)
    counts = [-(-length // shape.block_size) for _, length in shape.spans]
    num_blocks = sum(counts) + 2
    order = rng.sample(range(num_blocks), num_blocks)
    tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int64)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor(order[:count])
        order = order[count:]
    kv_shape = (num_blocks, shape.block_size, shape.num_kv_heads)
    keys = torch.randn(*kv_shape, shape.dim).to(shape.dtype)
    values = torch.randn(*kv_shape, shape.value_dim).to(shape.dtype)
    for block in order:
        keys[block], values[block] = torch.nan, torch.nan
    sizes = (shape.block_size, shape.num_kv_heads, shape.dim, shape.value_dim)
    packed = tuple(
        poisoned(shape, num_blocks, block) for block in block_shapes(*sizes, shape.dtype)
    )
    slots = torch.randperm(num_blocks * shape.block_size)
    k, v = keys.flatten(0, 1)[slots], values.flatten(0, 1)[slots]
    write_kv(library, k, v, *packed, slots)
    if shape.is_int8:
        keys, values = dequantized(keys), dequantized(values)
    num_queries = sum(count for count, _ in shape.spans)
    num_heads = shape.num_kv_heads * shape.group
    wide = torch.randn(num_queries, num_heads + 1, shape.dim).to(shape.dtype)
    sinks = torch.randn(num_heads) if shape.has_sinks else None
    return Case(wide[:, :num_heads], keys, values, packed, tables, sinks)


def poisoned(shape: Shape, num_blocks: int, block: tuple[int, ...]) -> KVSide:
    if not shape.is_int8:
        return KVSide(torch.full((num_blocks, *block), torch.nan, dtype=shape.dtype))
    data = torch.full((num_blocks, *block), 99, dtype=torch.int8)
    return KVSide(data, torch.full((num_blocks, block[0], shape.block_size), torch.nan))


def dequantized(numbers: Tensor) -> Tensor:
    data, scales = quantize(numbers, torch.int8)
    return data * scales[..., None]


def run(library: Library, shape: Shape, case: Case, **changes: Any) -> Tensor:
    rows = [(row, *span) for row, span in enumerate(shape.spans)]
    spans = Spans(torch.tensor(changes.get("spans", rows)), case.tables, shape.window)
    q = changes.get("q", case.q)
    return attend(library, q, *case.packed, spans, 0.1, shape.soft_cap, case.sinks)


def textbook(shape: Shape, case: Case) -> Tensor:
    """One query and one head at a time, in float64."""
    out, place = torch.empty(*case.q.shape[:2], shape.value_dim), 0
    for row, (num_queries, length) in enumerate(shape.spans):
        k, v = (kv[case.tables[row]].flatten(0, 1).double() for kv in (case.keys, case.values))
        for index in range(num_queries):
            end = length - num_queries + index + 1
            seen = slice(max(0, end - shape.window) if shape.window else 0, end)
            for head in range(case.q.shape[1]):
                kv_head = head // shape.group
                scores = k[seen, kv_head] @ case.q[place, head].double() * 0.1
                if shape.soft_cap:
                    scores = (scores / shape.soft_cap).tanh() * shape.soft_cap
                if case.sinks is not None:
                    scores = torch.cat((scores, case.sinks[head : head + 1].double()))
                weights = scores.softmax(0)[: end - seen.start]
                out[place, head] = weights @ v[seen, kv_head]
            place += 1
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_attention_equals_the_textbook(library: Library, name: str) -> None:
    shape = SHAPES[name]
    case = make(library, shape)
    error = (run(library, shape, case).float() - textbook(shape, case)).abs().max()
    assert error < (2e-2 if shape.dtype == BF16 else 2e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_a_query_alone_gives_the_same_bits_as_in_a_batch(library: Library, name: str) -> None:
    shape = SHAPES[name]
    case = make(library, shape)
    whole, place = run(library, shape, case), 0
    for row, (num_queries, length) in enumerate(shape.spans):
        for index in {0, num_queries // 2, num_queries - 1}:
            span = [(row, 1, length - num_queries + index + 1)]
            alone = run(library, shape, case, spans=span, q=case.q[place + index][None])
            assert torch.equal(alone[0], whole[place + index])
        place += num_queries


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.endswith("int8")])
def test_int8_reads_as_the_same_numbers_in_the_type_of_the_queries(
    library: Library, name: str
) -> None:
    shape = SHAPES[name]
    case = make(library, shape)
    wide = tuple(
        KVSide((side.data.nan_to_num() * 40).round().clamp(-128, 127)) for side in case.packed
    )
    narrow = tuple(
        KVSide(side.data.to(torch.int8), torch.ones(*side.data.shape[:2], shape.block_size))
        for side in wide
    )
    first, second = (run(library, shape, case._replace(packed=kv)) for kv in (wide, narrow))
    assert first.abs().max() > 1 and torch.equal(first, second)


@pytest.mark.parametrize("name", ["decodes", "chunk-of-a-prompt", "window-of-chunks", "sinks"])
def test_the_number_of_threads_changes_no_bit(library: Library, name: str) -> None:
    shape = SHAPES[name]
    case = make(library, shape)
    results = []
    for number in (1, 2, 64):  # with many, contexts are split
        torch.set_num_threads(number)
        results.append(run(library, shape, case))
    assert all(torch.equal(results[0], result) for result in results)


def test_a_write_touches_its_slots_only(library: Library) -> None:
    for dtype in (BF16, F32):
        shapes = block_shapes(16, 2, 32, 16, dtype)
        keys, values = (KVSide(torch.zeros(3, *shape, dtype=dtype)) for shape in shapes)
        k, v = torch.ones(2, 2, 32, dtype=dtype), torch.ones(2, 2, 16, dtype=dtype)
        write_kv(library, k, v, keys, values, torch.tensor([17, 40]))
        assert keys.data.sum() == k.numel() and values.data.sum() == v.numel()
        assert not keys.data[0].any() and not values.data[0].any()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_a_write_in_int8_stores_what_torch_does(library: Library, dtype: torch.dtype) -> None:
    shapes = block_shapes(16, 2, 32, 16, dtype)
    keys, values = (
        KVSide(torch.zeros(3, *shape, dtype=torch.int8), torch.zeros(3, 2, 16)) for shape in shapes
    )
    k, v = torch.randn(3, 2, 32).to(dtype) * 50, torch.randn(3, 2, 16).to(dtype)
    k[0, 0], k[1, 1, 3], v[0, 1, 5] = 0.0, torch.inf, torch.nan
    slots = torch.tensor([17, 40, 2])
    write_kv(library, k, v, keys, values, slots)
    for side, numbers, is_key in ((keys, k, True), (values, v, False)):
        data, scales = quantize(numbers, torch.int8)
        for token, slot in enumerate(slots.tolist()):
            block, place = divmod(slot, 16)
            per, width = side.data.shape[-1], numbers.shape[2]
            stored = side.data[block, :, 0, :, place] if is_key else None
            if stored is None:
                stored = side.data[block, :, place // per, :, place % per]
            assert torch.equal(stored.reshape(2, width), data[token])
            torch.testing.assert_close(
                side.scales[block, :, place], scales[token], rtol=0, atol=0, equal_nan=True
            )
        assert torch.count_nonzero(side.scales) == torch.count_nonzero(scales)
        assert torch.count_nonzero(side.data) == torch.count_nonzero(data)


def test_shapes_that_do_not_fit_are_known() -> None:
    assert fits(16, 128, 128, BF16) and fits(64, 576, 512, F32)
    assert not fits(8, 128, 128, BF16)  # fewer tokens than lanes
    assert not fits(16, 128, 24, BF16)
    assert not fits(16, 640, 640, BF16)
    assert not fits(16, 128, 128, torch.float16)
