"""Attention over KV blocks, by chunks and by tiles of queries, against one query after another."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from vllm_models.gpu import paged_chunks, paged_decode, paged_prefill
from vllm_models.gpu.paged_attention import paged_attention
from vllm_models.gpu.paged_chunks import plan
from vllm_models.gpu.paged_decode import tile_for
from vllm_models.gpu.paged_shapes import sizes
from vllm_models.gpu.spans import GpuSpans
from vllm_models.kernels.kv_side import KVSide, quantize
from vllm_models.kernels.paged_attention import Span, reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
TOLERANCES = {F32: 1e-5, F16: 5e-3, BF16: 3e-2}
NOWHERE = 1 << 30  # a block that does not exist
Queries = list[tuple[int, int]]  # queries and context length of each sequence


class Case(NamedTuple):
    """A layer.

    Attributes:
        heads: Query heads and KV heads.
        dims: Of keys and values; values of width 0 are read from the keys.
        block_size: Positions.
        dtype: Of queries.
        pool: Of keys and values.
        window: Positions.
        soft_cap: Of scores.
        has_sinks: A score of nothing for each head.
    """

    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    block_size: int = 16
    dtype: torch.dtype = F32
    pool: torch.dtype = F32
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False

    @property
    def scale(self) -> float:
        """Of scores."""
        return 2 * self.dims[0] ** -0.5


class Batch(NamedTuple):
    """A step, and what has to come out of it."""

    q: Tensor
    keys: KVSide
    values: KVSide
    spans: GpuSpans
    sinks: Tensor | None
    wanted: Tensor


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds no numbers, and places that do not exist."""
    monkeypatch.setattr(torch, "empty", poisoned)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    value = torch.nan if dtype.is_floating_point else NOWHERE
    return torch.full(shape, value, dtype=dtype, device=device)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def kv_side(num_blocks: int, case: Case, width: int, seed: int) -> tuple[KVSide, KVSide]:
    """Keys or values: [B, P, K, D], and the same [B, K, P, D]."""
    numbers = noise(num_blocks, case.block_size, case.heads[1], width, seed=seed)
    if case.pool in (INT8, FLOAT8):
        side = KVSide(*quantize(numbers, case.pool))
        return side, KVSide(
            side.data.transpose(1, 2).contiguous(), side.scales.transpose(1, 2).contiguous()
        )
    side = KVSide(numbers.to(case.pool))
    return side, KVSide(side.data.transpose(1, 2).contiguous())


def spoil(side: KVSide, table: Tensor, length: int) -> None:
    """What lies behind a context holds no numbers."""
    block_size = side.data.shape[2]
    for place in range(length, len(table) * block_size):
        block, offset = int(table[place // block_size]), place % block_size
        if side.scales is not None:
            side.scales[block, :, offset] = torch.nan
        else:
            side.data[block, :, offset] = torch.nan


def make(case: Case, queries: Queries, device: torch.device) -> Batch:
    """Sequences in rows of the tables that are not in order."""
    count, longest = len(queries), max(length for _, length in queries)
    width = -(-longest // case.block_size)
    generator = torch.Generator().manual_seed(1)
    tables = torch.randperm(count * width, generator=generator).view(count, width)
    rows = torch.randperm(count, generator=generator)
    plain_keys, keys = kv_side(count * width, case, case.dims[0], 2)
    plain_values, values = plain_keys, keys
    if case.dims[1]:
        plain_values, values = kv_side(count * width, case, case.dims[1], 3)
    q = noise(sum(n for n, _ in queries), case.heads[0], case.dims[0]).to(case.dtype)
    sinks = noise(case.heads[0], seed=4) if case.has_sinks else None
    wanted = reference(
        q.float(),
        plain_keys,
        plain_values,
        [Span(int(row), n, length) for row, (n, length) in zip(rows, queries, strict=True)],
        tables,
        case.scale,
        case.window,
        case.soft_cap,
        sinks,
    )
    known = tables.clone()
    for row, (_, length) in zip(rows, queries, strict=True):
        for side in (keys, values):
            spoil(side, tables[row], length)
        known[row, -(-length // case.block_size) :] = NOWHERE
    starts = torch.tensor([0, *(n for n, _ in queries)]).cumsum(0)
    lengths = torch.tensor([length for _, length in queries])
    integers = (x.to(device, torch.int32) for x in (rows, starts, lengths, known))
    spans = GpuSpans(*integers, case.window, max(n for n, _ in queries), longest)
    sides = (KVSide(*(x if x is None else x.to(device) for x in side)) for side in (keys, values))
    keys, values = sides
    values = values if case.dims[1] else keys
    sinks = None if sinks is None else sinks.to(device, case.dtype)
    return Batch(q.to(device), keys, values, spans, sinks, wanted.to(device))


def attend(case: Case, batch: Batch) -> Tensor:
    scoring = (case.scale, case.soft_cap, batch.sinks)
    return paged_attention(batch.q, *batch.keys, *batch.values, batch.spans, *scoring)


def check(case: Case, queries: Queries, device: torch.device) -> None:
    batch = make(case, queries, device)
    got = attend(case, batch)
    tolerance = TOLERANCES[case.dtype]
    assert got.dtype == case.dtype
    torch.testing.assert_close(got.float(), batch.wanted, atol=tolerance, rtol=tolerance)


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 200)
FEWER = (17, 1, 64, 65)
CASES = {
    "plain": Case(),
    "one_head_each": Case(heads=(2, 2), block_size=32),
    "groups_of_3": Case(heads=(6, 2), block_size=128, dtype=BF16, pool=BF16),
    "groups_of_4": Case(heads=(8, 2), has_sinks=True, dtype=F16, pool=F16),
    "groups_of_8": Case(heads=(8, 1), dims=(128, 128), dtype=BF16, pool=INT8),
    "window": Case(window=20, block_size=64),
    "soft_cap": Case(soft_cap=2.0, has_sinks=True, window=33),
    "dims_80": Case(dims=(80, 80), dtype=BF16, pool=FLOAT8),
    "unequal_dims": Case(dims=(96, 32), pool=INT8),
    "dims_256": Case(heads=(2, 1), dims=(256, 256), pool=FLOAT8, soft_cap=3.0),
    "latent": Case(heads=(2, 1), dims=(576, 0), dtype=BF16, pool=BF16),
    "latent_bytes": Case(heads=(17, 1), dims=(72, 0), dtype=BF16, pool=FLOAT8, block_size=64),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_query_of_each_sequence(device: torch.device, case: Case) -> None:
    lengths = LENGTHS if case == Case() else FEWER
    check(case, [(1, length) for length in lengths], device)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_prompts_and_single_queries_in_one_step(device: torch.device, case: Case) -> None:
    check(case, [(17, 17), (1, 40), (9, 65)], device)


@pytest.mark.parametrize("name", ["plain", "window", "dims_80"])
def test_contexts_of_several_chunks(device: torch.device, name: str) -> None:
    case = CASES[name]._replace(window=500 if CASES[name].window else 0)
    check(case, [(1, 1000 if name == "plain" else 530), (1, 256), (1, 3)], device)


@pytest.mark.parametrize("name", ["plain", "window", "groups_of_3", "groups_of_8"])
def test_a_few_queries_of_each_sequence(device: torch.device, name: str) -> None:
    check(CASES[name], [(3, 260), (1, 65), (4, 4), (2, 258)], device)


def test_a_prompt_over_several_tiles_of_queries(device: torch.device) -> None:
    for case in (Case(), Case(window=70, dtype=BF16, pool=BF16)):
        check(case, [(140, 150), (70, 70)], device)


@pytest.mark.parametrize(
    ("dim", "value_dim", "is_read_once"),
    [(80, 64, True), (28, 20, True), (128, 64, False), (80, 40, False)],
)
def test_values_may_be_the_first_columns_of_the_keys(
    device: torch.device, dim: int, value_dim: int, is_read_once: bool
) -> None:
    case = Case(heads=(4, 1), dims=(dim, 0))
    for queries in ([(1, 70), (1, 300)], [(12, 70)]):
        batch = make(case, queries, device)
        whole = attend(case, batch)
        values = batch.values._replace(data=batch.keys.data[..., :value_dim])
        known = sizes(batch.keys.data, values.data, 4, has_window=False, has_cap=False)
        assert known.is_shared and known.is_read_once == is_read_once
        part = attend(case, batch._replace(values=values))
        assert torch.equal(part, whole[..., :value_dim])


def test_rows_that_only_fill_a_bucket_disturb_nobody(device: torch.device) -> None:
    case = Case()
    batch = make(case, [(1, 300), (1, 5), (1, 1), (1, 1)], device)
    got = attend(case, batch)
    fewer = batch.spans._replace(
        rows=batch.spans.rows[:2],
        starts=batch.spans.starts[:3],
        lengths=batch.spans.lengths[:2],
        max_length=5000,
    )
    alone = attend(case, batch._replace(q=batch.q[:2], spans=fewer))
    assert torch.equal(alone, got[:2])


@pytest.mark.parametrize("name", ["plain", "soft_cap"])
def test_a_sequence_gets_the_same_in_every_batch(device: torch.device, name: str) -> None:
    case = CASES[name]
    queries = [(1, 300), (10, 50), (1, 30), (33, 40)]
    batch = make(case, queries, device)
    whole, spans = attend(case, batch), batch.spans
    starts = spans.starts.tolist()
    for order in ([0], [3], [3, 1, 0, 2]):
        tokens = [place for i in order for place in range(starts[i], starts[i + 1])]
        counts = torch.tensor([0, *(queries[i][0] for i in order)])
        chosen = spans._replace(
            rows=spans.rows[order],
            lengths=spans.lengths[order],
            starts=counts.cumsum(0).to(spans.starts),
            max_queries=int(counts.max()),
        )
        got = attend(case, batch._replace(q=batch.q[tokens], spans=chosen))
        assert torch.equal(got, whole[tokens])


def test_a_prompt_gets_the_same_however_it_is_cut(device: torch.device) -> None:
    case = Case(dtype=BF16, pool=BF16)
    batch = make(case, [(60, 90)], device)
    whole = attend(case, batch)
    for first, last in ((0, 24), (24, 60), (10, 20)):
        starts = torch.tensor([0, last - first]).to(batch.spans.starts)
        spans = batch.spans._replace(
            starts=starts, lengths=batch.spans.lengths - (60 - last), max_queries=last - first
        )
        got = attend(case, batch._replace(q=batch.q[first:last], spans=spans))
        assert torch.equal(got, whole[first:last])


def test_layers_can_share_a_plan(device: torch.device) -> None:
    case = Case()
    batch = make(case, [(1, 300), (1, 70)], device)
    spans = batch.spans._replace(chunks=plan(batch.spans, *case.heads))
    assert torch.equal(
        attend(case, batch._replace(spans=spans)),
        attend(case, batch._replace(q=batch.q.clone())),
    )


@pytest.mark.parametrize("window", [0, 300, 5000])
def test_chunks_cover_what_is_seen_and_nothing_twice(device: torch.device, window: int) -> None:
    lengths = (1, 256, 257, 4096, 4097, 32768, 32769, 100_000)
    queries = (1, 1, 1, 1, 9, 1, 1, 1)
    spans = GpuSpans(
        *(torch.tensor(x, dtype=torch.int32, device=device) for x in _planned(lengths, queries)),
        window,
        max(queries),
        max(lengths),
    )
    chunks = plan(spans, 8, 4)
    ends = chunks.ends.tolist()
    assert ends[-1] <= len(chunks.items)
    firsts = [i * 256 for i in range(16)] + [4096 + i * 1024 for i in range(28)]
    firsts += [32768 + i * 4096 for i in range(20)]
    for index, length in enumerate(lengths):
        items = chunks.items[ends[index] : ends[index + 1], :6].tolist()
        if queries[index] == 9:
            assert not items
            continue
        start, seen = sum(queries[:index]), max(0, length - window) if window else 0
        last = max(i for i, first in enumerate(firsts) if first < length)
        first = max(i for i, first in enumerate(firsts) if first <= seen)
        wanted = [[start, 1, index + 3, length, i, int(first == last)] for i in range(last, -1, -1)]
        assert items == wanted[: last - first + 1]


def _planned(
    lengths: tuple[int, ...], queries: tuple[int, ...]
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    return list(range(3, 3 + len(lengths))), starts, list(lengths), [[0]]


def test_real_shapes_are_compiled_ahead_of_time() -> None:
    names = [
        variant.name
        for kernels in (paged_chunks, paged_decode, paged_prefill)
        for variant in kernels.variants()
    ]
    assert len(set(names)) == len(names)
    for variant in paged_decode.variants():
        assert variant.no_spills
        assert set(variant.kernel.arg_names) == {*variant.signature, *variant.constants}


def test_few_queries_are_those_whose_heads_fit() -> None:
    assert [paged_chunks.queries_for(n, 2) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 1]
    assert [paged_chunks.queries_for(n, 16) for n in (1, 4, 5)] == [1, 4, 1]


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_tiles_of_all_widths_fit_into_shared_memory(itemsize: int) -> None:
    for dim in (64, 80, 96, 128, 192, 256, 512, 576):
        for value_dim, is_shared in ((dim, False), (dim, True), (64, False)):
            tiling = tile_for(dim, value_dim, itemsize, is_shared)
            assert 16 <= tiling.tile <= 256 and paged_chunks.base_for(1) % tiling.tile == 0
            assert 2 * tiling.num_bytes >= 23 * 1024  # in flight, of two programs
            assert tiling.num_bytes + 16_384 <= 163 * 1024
