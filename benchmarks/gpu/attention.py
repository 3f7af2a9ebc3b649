"""Attention on the shapes of real models: decode against the copy rate, prompts against products,
and once at odd lengths against plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm_models.gpu.launch import kernels
from vllm_models.gpu.spans import GpuSpans

from benchmarks.gpu.case import Call, Case, Work

_ODD = (1, 15, 16, 17, 63, 64, 65, 1000, 8191)
_MOST_KV = 24 << 30  # bytes of keys and values of one case


class Heads(NamedTuple):
    """Of a layer."""

    queries: int
    kv: int
    dim: int = 128

    def __str__(self) -> str:
        return f"{self.queries}/{self.kv} heads of {self.dim}"


class Step(NamedTuple):
    """Sequences of one step.

    Attributes:
        heads: Of the layer.
        queries: Of each sequence.
        contexts: Of each sequence, queries included.
        is_8_bit: Keys and values are stored in FP8.
        window: 0 is none.
        soft_cap: 0 is none.
    """

    heads: Heads
    queries: int
    contexts: tuple[int, ...]
    is_8_bit: bool = False
    window: int = 0
    soft_cap: float = 0.0

    @property
    def name(self) -> str:
        """What differs from a plain decode step."""
        lengths = f"{len(self.contexts)} x {max(self.contexts)}"
        extra = [f"{self.queries} queries"] if self.queries > 1 else []
        extra += ["fp8 KV"] if self.is_8_bit else []
        extra += [f"window {self.window}"] if self.window else []
        extra += ["soft cap"] if self.soft_cap else []
        return ", ".join([lengths, str(self.heads), *extra])

    @property
    def work(self) -> Work:
        """KV once, queries and answers once; the products of the causal half."""
        heads = self.heads
        per_head = heads.dim + 4 if self.is_8_bit else 2 * heads.dim
        seen = [min(c, self.window + self.queries) if self.window else c for c in self.contexts]
        pairs = sum(self.queries * length - self.queries**2 // 2 for length in seen)
        rows = self.queries * len(self.contexts)
        moved = 2 * sum(seen) * heads.kv * per_head + 4 * rows * heads.queries * heads.dim
        return Work(moved, 4 * pairs * heads.queries * heads.dim)


def decode_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Batch by context by heads per KV head, in 16 and 8 bits."""
    shapes = (Heads(16, 8), Heads(32, 8), Heads(32, 4))
    batches, contexts = (1, 8, 32, 256), (128, 1024, 8192, 32768)
    if is_tiny:
        shapes, batches, contexts = (Heads(4, 2, 16),), (2,), (33,)
    for is_8_bit in (False, True):
        for heads in shapes:
            for batch in batches:
                for context in contexts:
                    step = Step(heads, 1, (context,) * batch, is_8_bit)
                    if step.work.num_bytes <= _MOST_KV:
                        yield _case("decode attention", step, device, batch * context <= 65536)


def prompt_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Causal prompts, and a chunk behind a long context."""
    shapes, lengths = (Heads(16, 8), Heads(32, 8)), (1024, 4096, 16384)
    if is_tiny:
        shapes, lengths = (Heads(4, 2, 16),), (33,)
    for heads in shapes:
        for length in lengths:
            step = Step(heads, length, (length,))
            yield _case("prompt attention", step, device, length <= 1024)
            yield _library_case(step, device)
        chunk = Step(heads, lengths[0], (lengths[-1] + lengths[0],))
        yield _case("prompt attention", chunk, device, False)


def odd_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Right or wrong, at lengths around the edges of blocks and tiles."""
    lengths = _ODD[:4] if is_tiny else _ODD
    shapes = (Heads(4, 2, 16),) if is_tiny else tuple(Heads(8, 8 // g) for g in (1, 2, 4, 8))
    for heads in shapes:
        for changes in ({}, {"is_8_bit": True}, {"window": 24}, {"soft_cap": 30.0}):
            yield _case("odd lengths", Step(heads, 1, lengths, **changes), device, True)


def _case(kernel: str, step: Step, device: torch.device, is_checked: bool) -> Case:
    return Case(kernel, step.name, step.work, lambda: _call(step, device, is_checked), 0.03)


def _library_case(step: Step, device: torch.device) -> Case:
    """torch's own, without blocks, for comparison."""

    def make() -> Call:
        heads, length = step.heads, step.queries
        q, k, v = (
            torch.randn(1, number, length, heads.dim, device=device).bfloat16()
            for number in (heads.queries, heads.kv, heads.kv)
        )
        return Call(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    return Case("torch's attention", step.name, step.work, make)


def _call(step: Step, device: torch.device, is_checked: bool, block: int = 64) -> Call:
    heads, count = step.heads, len(step.contexts)
    block = min(block, 16) if heads.dim < 64 else block
    needed = [-(-length // block) for length in step.contexts]
    tables = torch.zeros(count + 1, max(needed), dtype=torch.int32)
    order = torch.randperm(sum(needed)).int()  # blocks of a sequence are seldom neighbours
    for row, (own, number) in enumerate(zip(order.split(needed), needed, strict=True)):
        tables[row, :number] = own
    pool = (sum(needed) + 1, heads.kv, block, heads.dim)
    keys, values = (_stored(pool, step.is_8_bit, device) for _ in range(2))
    q = torch.randn(count * step.queries, heads.queries, heads.dim, device=device).bfloat16()
    spans = GpuSpans(
        rows=torch.arange(count, dtype=torch.int32, device=device),
        starts=torch.arange(count + 1, dtype=torch.int32, device=device) * step.queries,
        lengths=torch.tensor(step.contexts, dtype=torch.int32, device=device),
        tables=tables.to(device),
        window=step.window,
        max_queries=step.queries,
        max_length=max(step.contexts),
        min_queries=step.queries,
    )
    scale = heads.dim**-0.5

    def run() -> Tensor:
        return kernels().paged_attention(q, *keys, *values, spans, scale, step.soft_cap)

    dense = _dense(step, q, keys, values, tables, block)
    return Call(run, dense if is_checked else None)


def _stored(
    pool: tuple[int, ...], is_8_bit: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    values = torch.empty(pool, dtype=torch.bfloat16, device=device).normal_()
    if not is_8_bit:
        return values, None
    scales = values.abs().amax(-1).float() / 448
    return (values / scales[..., None]).to(torch.float8_e4m3fn), scales


def _dense(
    step: Step,
    q: Tensor,
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    tables: Tensor,
    block: int,
) -> Callable[[], Tensor]:
    """Sequence by sequence in float32."""

    def gathered(side: tuple[Tensor, Tensor | None], row: int, length: int) -> Tensor:
        blocks = tables[row, : -(-length // block)].long().to(side[0].device)
        data = side[0][blocks].float()
        data = data if side[1] is None else data * side[1][blocks][..., None]
        return data.transpose(1, 2).flatten(0, 1)[:length]  # [L, K, D]

    def run() -> Tensor:
        parts: list[Tensor] = []
        for row, length in enumerate(step.contexts):
            own = q[row * step.queries : (row + 1) * step.queries].float()
            k, v = gathered(keys, row, length), gathered(values, row, length)
            parts.append(_attend(own, k, v, step))
        return torch.cat(parts)

    return run


def _attend(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    group = step.heads.queries // step.heads.kv
    k, v = (side.repeat_interleave(group, 1) for side in (k, v))
    scores = torch.einsum("qhd,lhd->hql", q, k) * step.heads.dim**-0.5
    if step.soft_cap:
        scores = step.soft_cap * (scores / step.soft_cap).tanh()
    ends = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
    places = torch.arange(len(k), device=q.device)
    hidden = places > ends
    if step.window:
        hidden |= places <= ends - step.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hql,lhd->qhd", weights, v)


def cases(device: torch.device, is_tiny: bool) -> dict[str, Sequence[Case]]:
    """By stage."""
    return {
        "attention at odd lengths": list(odd_cases(device, is_tiny)),
        "decode attention": list(decode_cases(device, is_tiny)),
        "prompt attention": list(prompt_cases(device, is_tiny)),
    }
