"""Causal attention of a ragged batch over KV blocks.

q [T, H, D]; keys [B, P, K, D]; values [B, P, K, W] -> [T, H, W]. Every sequence owns a span of
consecutive queries, the last `num_queries` positions of its context. With a window of W, a query
sees the W positions that end with its own:

    positions   0 ........ context_length - num_queries ........ context_length - 1
                [ read from blocks only ][ queries of this step, written before ]

`prepare` is called once per step and window, `paged_attention` once per layer. Spans of a few
queries (decodes and drafts) are computed together, padded to the longest context of their group;
longer spans (prompts) one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_models.gpu.launch import kernels
from vllm_models.gpu.spans import GpuSpans
from vllm_models.kernels.kv_side import KVSide
from vllm_models.native.attention import Spans, attend
from vllm_models.native.library import loaded

SHORT_SPAN = 4  # queries; above it a span is worth a call of its own
MAX_SCORES = 1 << 24  # held at once where scores are computed step by step
GROUP_POSITIONS = 8192  # gathered per group: keeps the gathered keys in the processor's cache


class Span(NamedTuple):
    """One sequence's queries in a step.

    Attributes:
        row: Which block table is its own.
        num_queries: At least 1.
        context_length: Positions it sees, its own queries included.
    """

    row: int
    num_queries: int
    context_length: int


class Group(NamedTuple):
    """Single queries that are computed together, each with its own blocks and length."""

    queries: Tensor | None  # [G] places in T, None if they are all of T in order
    blocks: Tensor  # [G * N]
    mask: Tensor  # [G, 1, 1, N * P] added to the scores


class Prompt(NamedTuple):
    """Consecutive queries of one sequence."""

    queries: slice
    context_length: int
    blocks: Tensor  # [N]
    mask: Tensor | None  # [num_queries, context_length]; None is the plain triangle


class Scoring(NamedTuple):
    """How queries and keys make weights; see `paged_attention`."""

    scale: float
    soft_cap: float
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether the scores are a softmax of products and nothing else."""
        return not self.soft_cap and self.sinks is None


class Prepared(NamedTuple):
    """The shape of a step's attention, the same in every layer of one window."""

    groups: tuple[Group, ...]
    prompts: tuple[Prompt, ...]


def prepare(
    spans: Sequence[Span],
    block_tables: Tensor,
    block_size: int,
    dtype: torch.dtype,
    window: int = 0,
) -> Prepared:
    """Decide which queries are computed together.

    Args:
        spans: In the order of the queries.
        block_tables: [rows, N]; entries past a sequence's end must be valid blocks.
        block_size: Positions per block.
        dtype: Of the queries.
        window: Positions a query looks back, its own included; 0 is all.
    """
    singles: list[tuple[int, int, int]] = []  # context length, place in T, row
    prompts: list[Prompt] = []
    place = 0
    for row, num_queries, length in spans:
        if num_queries <= SHORT_SPAN:
            first = length - num_queries + 1
            singles += [(first + i, place + i, row) for i in range(num_queries)]
        else:
            table = block_tables[row, : -(-length // block_size)]
            plain = length == num_queries and (window == 0 or length <= window)
            mask = None if plain else _mask(num_queries, length, window, dtype, table)
            prompts.append(Prompt(slice(place, place + num_queries), length, table, mask))
        place += num_queries
    groups = _group(singles, block_tables, block_size, dtype, window, in_order=not prompts)
    return Prepared(tuple(groups), tuple(prompts))


def prepare_native(spans: Sequence[Span], block_tables: Tensor, window: int = 0) -> Spans:
    """The same for keys and values in the order of the CPU's kernels."""
    return Spans(torch.tensor(spans, dtype=torch.int64), block_tables, window)


def _mask(num_queries: int, length: int, window: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    visible = torch.ones((num_queries, length), dtype=torch.bool, device=like.device)
    visible = visible.tril_(length - num_queries)
    if window:
        visible = visible.triu_(length - num_queries - window + 1)
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _group(
    singles: list[tuple[int, int, int]],
    block_tables: Tensor,
    block_size: int,
    dtype: torch.dtype,
    window: int,
    in_order: bool,
) -> list[Group]:
    """Queries of similar context share a group, so that little is padding."""
    longest = max((length for length, _, _ in singles), default=0)
    if len(singles) * longest > GROUP_POSITIONS:
        singles = sorted(singles, reverse=True)
        in_order = False
    device = block_tables.device
    groups: list[Group] = []
    while singles:
        num_blocks = -(-max(length for length, _, _ in singles) // block_size)
        size = (
            max(1, GROUP_POSITIONS // (num_blocks * block_size)) if not in_order else len(singles)
        )
        members, singles = singles[:size], singles[size:]
        table = torch.tensor(
            [(length, place, row) for length, place, row in members], device=device
        )
        lengths, places, rows = table.unbind(1)
        positions = torch.arange(num_blocks * block_size, device=device)
        mask = torch.zeros(len(members), len(positions), dtype=dtype, device=device)
        mask.masked_fill_(positions >= lengths[:, None], -torch.inf)
        if window:
            mask.masked_fill_(positions < lengths[:, None] - window, -torch.inf)
        blocks = block_tables[rows, :num_blocks].flatten()
        groups.append(Group(None if in_order else places, blocks, mask[:, None, None]))
    return groups


def paged_attention(
    q: Tensor,
    keys: KVSide,
    values: KVSide,
    prepared: Prepared | Spans | GpuSpans,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from every query of the step to the blocks of its sequence: [T, H, W].

    Args:
        q: [T, H, D].
        keys: [B, P, K, D].
        values: [B, P, K, W].
        prepared: Of the step, for the layout of the keys and values.
        scale: Multiplies the scores.
        soft_cap: Scores s become cap * tanh(s / cap); 0 leaves them.
        sinks: [H] a score of nothing, beside those of the keys.
    """
    if isinstance(prepared, GpuSpans):
        return kernels().paged_attention(q, *keys, *values, prepared, scale, soft_cap, sinks)
    if isinstance(prepared, Spans):
        return attend(loaded(), q, keys, values, prepared, scale, soft_cap, sinks)
    return _attend_all(q, keys, values, prepared, Scoring(scale, soft_cap, sinks))


def _attend_all(
    q: Tensor, keys: KVSide, values: KVSide, prepared: Prepared, scoring: Scoring
) -> Tensor:
    groups, prompts = prepared
    if len(groups) == 1 and groups[0].queries is None:
        return _attend_group(q, keys, values, groups[0], scoring)
    out = q.new_empty((*q.shape[:2], values.data.shape[3]))
    for group in groups:
        members = q.index_select(0, group.queries)
        out.index_copy_(0, group.queries, _attend_group(members, keys, values, group, scoring))
    for prompt in prompts:
        out[prompt.queries] = _attend_prompt(q[prompt.queries], keys, values, prompt, scoring)
    return out


def _attend_group(q: Tensor, keys: KVSide, values: KVSide, group: Group, how: Scoring) -> Tensor:
    """The query heads of one kv head stand in the place of query positions: nothing is repeated."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, value_dim = keys.data.shape[2], values.data.shape[3]
    folded = q.reshape(num_queries, num_kv_heads, -1, head_dim)  # [G, K, H/K, D]
    shape = (num_queries, -1, num_kv_heads)
    k = keys.dequantized(group.blocks, q.dtype).view(*shape, head_dim).transpose(1, 2)
    v = values.dequantized(group.blocks, q.dtype).view(*shape, value_dim).transpose(1, 2)
    mask = group.mask.expand(-1, 1, folded.shape[2], -1)
    sinks = None if how.sinks is None else how.sinks.view(num_kv_heads, -1, 1)
    if how.is_plain:
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=how.scale)
    else:
        out = _attend(folded, k, v, mask, how._replace(sinks=sinks))
    return out.reshape(num_queries, num_heads, value_dim)


def _attend_prompt(q: Tensor, keys: KVSide, values: KVSide, prompt: Prompt, how: Scoring) -> Tensor:
    """Kv heads stand in the place of the batch, and each is shared by its query heads."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.data.shape[2]
    length = prompt.context_length
    shared = (num_kv_heads, num_heads // num_kv_heads, length, -1)
    folded = q.transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)  # [K, H/K, T, D]
    k, v = (
        side.dequantized(prompt.blocks, q.dtype).flatten(0, 1)[:length].transpose(0, 1)
        for side in (keys, values)
    )  # [K, L, D], [K, L, W]
    if how.is_plain:
        out = F.scaled_dot_product_attention(
            folded,
            k[:, None].expand(shared),
            v[:, None].expand(shared),
            attn_mask=prompt.mask,
            is_causal=prompt.mask is None,
            scale=how.scale,
        )
    else:
        mask = _mask(num_queries, length, 0, q.dtype, q) if prompt.mask is None else prompt.mask
        sinks = None if how.sinks is None else how.sinks.view(num_kv_heads, -1, 1, 1)
        size = max(1, MAX_SCORES // (num_heads * length))  # queries at once
        pieces = zip(folded.split(size, dim=2), mask.split(size), strict=True)
        how = how._replace(sinks=sinks)
        out = torch.cat([_attend(x, k[:, None], v[:, None], m, how) for x, m in pieces], dim=2)
    return out.flatten(0, 1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, how: Scoring) -> Tensor:
    """The steps one by one, in float32: [..., N, D] -> [..., N, W].

    A sink is one more key, which takes its share of the weights and has no value.
    """
    scores = (q @ k.transpose(-1, -2)).float() * how.scale  # [..., N, L]
    if how.soft_cap:
        scores = (scores / how.soft_cap).tanh_().mul_(how.soft_cap)
    scores = scores + mask
    if how.sinks is not None:
        sinks = how.sinks.float().expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[-2]]
    return weights.to(v.dtype) @ v


def reference(  # noqa: PLR0913 - those of the operator and of `prepare`
    q: Tensor,
    keys: KVSide,
    values: KVSide,
    spans: Sequence[Span],
    block_tables: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The textbook form: one query and one head at a time, in float32."""
    out, place = q.new_empty((*q.shape[:2], values.data.shape[3])), 0
    repeats = q.shape[1] // keys.data.shape[2]
    for row, num_queries, length in spans:
        k, v = (
            side.dequantized(block_tables[row], torch.float32).flatten(0, 1).float()
            for side in (keys, values)
        )
        for index in range(num_queries):
            end = length - num_queries + index + 1
            seen = slice(max(0, end - window) if window else 0, end)
            for head in range(q.shape[1]):
                scores = k[seen, head // repeats] @ q[place, head].float() * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].float().exp())
                out[place, head] = weights / total @ v[seen, head // repeats]
            place += 1
    return out
