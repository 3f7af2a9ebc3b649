"""What decode and prefill attention share: rows of queries, and what they attend to, by tiles.

Rows m of queries see the positions low[m] <= p < high[m]. With scores in powers of two,

    s = q k^T * scale * log2(e)     m = max s     total = sum 2^(s - m)     acc = sum 2^(s - m) v

SIZES is always a `paged_shapes.Sizes`. Sums of rows are acc, in the two parts of a head, largest
and total; keys and values are both with their scales, which are None for numbers of 16 bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.dot import add_dot
from vllm_models.gpu.paged_kv import load_part, store_head, tile_places

_LOG2_E = math.log2(math.e)


@triton.jit
def rows_of(first, queries, kv_head, part, ROWS: tl.constexpr, SIZES: tl.constexpr):
    """Query and head of every row, and which rows are there, from the query `first` on."""
    row = tl.arange(0, ROWS)
    query, head = first + row // SIZES.heads, part * SIZES.heads + row % SIZES.heads
    return query, kv_head * SIZES.group + head, (query < queries) & (head < SIZES.group)


@triton.jit
def load_queries(q, tokens, stride, heads, there, SIZES: tl.constexpr):
    """The queries of rows: both parts."""
    KEYS: tl.constexpr = SIZES.keys
    places = tokens.to(tl.int64) * stride + heads * KEYS.width
    main = load_part(q, places, there, q.dtype.element_ty, False, 1, KEYS, True)
    rest = main
    if KEYS.rest > 0:
        rest = load_part(q, places, there, q.dtype.element_ty, True, 1, KEYS, True)
    return main, rest


@triton.jit
def no_sums(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The sums of rows that have seen nothing."""
    MAIN: tl.constexpr = HEAD.main
    REST: tl.constexpr = HEAD.rest if HEAD.rest > 0 else 1
    acc, rest = tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST], tl.float32)
    return acc, rest, tl.full([ROWS], -1.0e30, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _products(q, data, places, there, SIZES: tl.constexpr, MASKED: tl.constexpr):
    """Of queries and keys [M, TILE], and both parts of the keys."""
    KEYS: tl.constexpr = SIZES.keys
    TILE: tl.constexpr = SIZES.tile
    element: tl.constexpr = q[0].dtype
    main = load_part(data, places, there, element, False, KEYS.stride, KEYS, MASKED)
    products = tl.zeros([q[0].shape[0], TILE], tl.float32)
    products = add_dot(products, q[0], tl.trans(main))
    rest = main
    if KEYS.rest > 0:
        rest = load_part(data, places, there, element, True, KEYS.stride, KEYS, MASKED)
        products = add_dot(products, q[1], tl.trans(rest))
    return products, (main, rest)


@triton.jit
def _scores(products, key_scales, places, there, factors, HAS_CAP: tl.constexpr):
    """Scores from products of queries and keys, and the factor that they lack."""
    if key_scales is not None:
        products = products * tl.load(key_scales + places, mask=there, other=0.0)[None, :]
    scale, soft_cap = factors
    if HAS_CAP:
        # `scale` is that of the hyperbolic tangent: 2 log2(e) / cap times that of the scores.
        return soft_cap * (1.0 - 2.0 / (tl.exp2(products * scale) + 1.0)), 1.0
    return products, scale


@triton.jit
def _seen(scores, positions, bounds, HAS_WINDOW: tl.constexpr):
    """The scores of positions that rows see; others are not there."""
    low, high = bounds
    seen = positions[None, :] < high[:, None]
    if HAS_WINDOW:
        seen &= positions[None, :] >= low[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _add_values(
    acc, rest, shrink, weights, k, data, places, there, SIZES: tl.constexpr, MASKED: tl.constexpr
):
    """acc, and the rest times `shrink`, plus the values by their weights; k are keys in parts."""
    VALUES: tl.constexpr = SIZES.values
    element: tl.constexpr = weights.dtype
    v, v_rest = k
    if not SIZES.is_read_once:
        v = load_part(data, places, there, element, False, VALUES.stride, VALUES, MASKED)
    acc = add_dot(acc, weights, v)
    if VALUES.rest > 0:
        if not SIZES.is_read_once:
            v_rest = load_part(data, places, there, element, True, VALUES.stride, VALUES, MASKED)
        rest = add_dot(rest * shrink[:, None], weights, v_rest)
    return acc, rest


@triton.jit
def attend_tile(
    sums,
    q,
    keys,
    values,
    table,
    kv_head,
    first,
    end,
    bounds,
    factors,
    SIZES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The sums of rows, and of a tile of positions.

    Args:
        sums: Of the rows.
        q: Both parts of the queries.
        keys: And `values`: with their scales.
        table: Blocks of the sequence.
        kv_head: Of the rows.
        first: Position where the tile begins.
        end: Positions from there on are not read.
        bounds: low and high, see above.
        factors: See `Scoring.factors`.
        SIZES: Of the layer and the program.
        MASKED: Rows may not see all of the tile.
    """
    places = tile_places(table, first, end, kv_head, SIZES)
    positions = first + tl.arange(0, SIZES.tile)
    there = positions < end
    products, k = _products(q, keys[0], places, there, SIZES, MASKED)
    scores, factor = _scores(products, keys[1], places, there, factors, SIZES.has_cap)
    if MASKED:
        scores = _seen(scores, positions, bounds, SIZES.has_window)
    acc, rest, before, total = sums
    largest = tl.maximum(before, tl.max(scores, axis=1) * factor)
    # Said to be one rounding, so that it is one with masks and without.
    weights = tl.exp2(tl.fma(scores, factor, -largest[:, None]))
    shrink = tl.exp2(before - largest)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    if values[1] is not None:
        weights = weights * tl.load(values[1] + places, mask=there, other=0.0)[None, :]
    acc, rest = _add_values(
        *(acc, rest, shrink, weights.to(q[0].dtype), k, values[0], places, there), SIZES, MASKED
    )
    return acc, rest, largest, total


@triton.jit
def _with_sink(sums, sinks, heads, there):
    """A score of nothing beside the others."""
    acc, rest, before, total = sums
    sink = tl.load(sinks + heads, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
    largest = tl.maximum(before, sink)
    shrink = tl.exp2(before - largest)
    total = total * shrink + tl.exp2(sink - largest)
    return acc * shrink[:, None], rest * shrink[:, None], largest, total


@triton.jit
def store_answers(out, sums, sinks, tokens, heads, there, SIZES: tl.constexpr):
    """Put what rows have attended to, sinks included, into out [T, H, W]."""
    VALUES: tl.constexpr = SIZES.values
    if sinks is not None:
        sums = _with_sink(sums, sinks, heads, there)
    acc, rest, _largest, total = sums
    total = tl.where(there, total, 1.0)[:, None]
    places = tokens.to(tl.int64) * (SIZES.num_kv_heads * SIZES.group) + heads
    store_head(out, places, there, acc / total, rest / total, VALUES)


class Scoring(NamedTuple):
    """How queries and keys make weights; see `paged_attention`."""

    scale: float
    soft_cap: float
    sinks: Tensor | None

    @property
    def factors(self) -> tuple[float, float]:
        """The scale and the cap of `_scores`."""
        if self.soft_cap:
            return 2 * _LOG2_E * self.scale / self.soft_cap, self.soft_cap * _LOG2_E
        return self.scale * _LOG2_E, 0.0
