"""The kernels that change logits [N, V] in place.

    text of row i = tokens[rows[i], : positions[i]], its first num_prompt_tokens[rows[i]] the prompt

Penalties are applied where a token occurs, not over the vocabulary: every occurrence adds to a
count, then takes the count out again, and the one that finds it makes the change. Counts are
integers, so the order never shows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024
_HISTORY_PROGRAMS = 16  # per row; each walks over its share of the text

_IN_PROMPT = tl.constexpr(1 << 30)  # above any count


class Bits(NamedTuple):
    """Allowed token ids of some rows of logits.

    Attributes:
        places: [n] int32 rows of logits.
        words: [n, ceil(V / 32)] int32, least significant bit first.
    """

    places: Tensor
    words: Tensor


class Biases(NamedTuple):
    """Pairs of place and token id, all different.

    Attributes:
        where: [n, 2] int32: row of logits, token id.
        values: [n] float32.
    """

    where: Tensor
    values: Tensor


class Bans(NamedTuple):
    """Every ban of a batch.

    Attributes:
        table: [n, 5] int32: row of logits, token id, until, and first and number of its tokens.
        after: [m] int32 tokens after which something is forbidden.
        longest: Most tokens of one ban.
    """

    table: Tensor
    after: Tensor
    longest: int


class Penalised(NamedTuple):
    """Rows with penalties.

    Attributes:
        places: [n] int32 rows of logits.
        values: [n, 3] float32, see `Penalties`.
        counts: [at most n, V] int32, zero between two steps.
    """

    places: Tensor
    values: Tensor
    counts: Tensor


@triton.jit
def _allowed_kernel(logits, places, words, vocab_size, stride, width, TILE: tl.constexpr):
    index = tl.program_id(0)
    place = tl.load(places + index).to(tl.int64)
    token_ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = token_ids < vocab_size
    word = tl.load(words + index.to(tl.int64) * width + token_ids // 32, mask=there, other=-1)
    is_allowed = (word >> (token_ids % 32)) & 1
    impossible = tl.full((TILE,), -float("inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(logits + place * stride + token_ids, impossible, mask=there & (is_allowed == 0))


def keep_allowed(logits: Tensor, allowed: Bits) -> None:
    """Forbid, in some rows of logits, every token whose bit is not set."""
    vocab_size = logits.shape[1]
    _allowed_kernel[(len(allowed.places), triton.cdiv(vocab_size, _TILE))](
        *(logits, *allowed, vocab_size, logits.stride(0), allowed.words.shape[1]),
        TILE=_TILE,
    )


@triton.jit(do_not_specialize=["num_bans", "longest"])
def _forbid_kernel(
    logits,
    table,
    after,
    rows,
    positions,
    tokens,
    num_prompt_tokens,
    num_bans,
    longest,
    stride,
    capacity,
    TILE: tl.constexpr,
):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = index < num_bans
    place = tl.load(table + index * 5, mask=there, other=0).to(tl.int64)
    token_id = tl.load(table + index * 5 + 1, mask=there, other=0)
    until = tl.load(table + index * 5 + 2, mask=there, other=0)
    first = tl.load(table + index * 5 + 3, mask=there, other=0)
    size = tl.load(table + index * 5 + 4, mask=there, other=0)
    row = tl.load(rows + place, mask=there, other=0).to(tl.int64)
    position = tl.load(positions + place, mask=there, other=0)
    num_prompt = tl.load(num_prompt_tokens + row, mask=there, other=0)
    holds = there & (position - num_prompt < until) & (size <= position)
    for i in range(0, longest):
        compared = holds & (i < size)
        wanted = tl.load(after + first + i, mask=compared, other=0)
        found = tl.load(tokens + row * capacity + position - size + i, mask=compared, other=0)
        holds = holds & (wanted == found)
    impossible = tl.full((TILE,), -float("inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(logits + place * stride + token_id, impossible, mask=holds)


def forbid(
    logits: Tensor,
    bans: Bans,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    num_prompt_tokens: Tensor,
) -> None:
    """Forbid the tokens whose condition holds; see `edits.apply` for the arguments."""
    num_bans, tile = len(bans.table), 128
    _forbid_kernel[(triton.cdiv(num_bans, tile),)](
        *(logits, bans.table, bans.after, rows, positions, tokens, num_prompt_tokens),
        *(num_bans, bans.longest, logits.stride(0), tokens.shape[1]),
        TILE=tile,
    )


@triton.jit(do_not_specialize=["num_biases"])
def _add_kernel(logits, where, values, num_biases, stride, TILE: tl.constexpr):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = index < num_biases
    place = tl.load(where + index * 2, mask=there, other=0).to(tl.int64)
    token_id = tl.load(where + index * 2 + 1, mask=there, other=0)
    out = logits + place * stride + token_id
    old = tl.load(out, mask=there, other=0.0).to(tl.float32)
    new = old + tl.load(values + index, mask=there, other=0.0)
    tl.store(out, new.to(logits.dtype.element_ty), mask=there)


def add_biases(logits: Tensor, biases: Biases) -> None:
    """Add to some logits."""
    num_biases, tile = len(biases.values), 128
    _add_kernel[(triton.cdiv(num_biases, tile),)](
        *(logits, biases.where, biases.values, num_biases, logits.stride(0)), TILE=tile
    )


@triton.jit
def _text_of(places, rows, positions, tokens, num_prompt_tokens, capacity):
    """Row of logits, tokens, their number, and how many are prompt."""
    place = tl.load(places + tl.program_id(0))
    row = tl.load(rows + place).to(tl.int64)
    length = tl.load(positions + place)
    num_prompt = tl.minimum(tl.load(num_prompt_tokens + row), length)
    return place.to(tl.int64), tokens + row * capacity, length, num_prompt


@triton.jit
def _count_kernel(
    counts,
    places,
    rows,
    positions,
    tokens,
    num_prompt_tokens,
    vocab_size,
    capacity,
    TILE: tl.constexpr,
):
    _, text, length, num_prompt = _text_of(
        places, rows, positions, tokens, num_prompt_tokens, capacity
    )
    own = counts + tl.program_id(0).to(tl.int64) * vocab_size
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        index = first + tl.arange(0, TILE)
        token_ids = tl.load(text + index, mask=index < length, other=0)
        tl.atomic_or(own + token_ids, _IN_PROMPT, mask=index < num_prompt)
        tl.atomic_add(own + token_ids, 1, mask=(index >= num_prompt) & (index < length))


@triton.jit
def _penalise_kernel(
    logits,
    counts,
    values,
    places,
    rows,
    positions,
    tokens,
    num_prompt_tokens,
    vocab_size,
    stride,
    capacity,
    TILE: tl.constexpr,
):
    place, text, length, _ = _text_of(places, rows, positions, tokens, num_prompt_tokens, capacity)
    own = counts + tl.program_id(0).to(tl.int64) * vocab_size
    repetition = tl.load(values + tl.program_id(0) * 3)
    frequency = tl.load(values + tl.program_id(0) * 3 + 1)
    presence = tl.load(values + tl.program_id(0) * 3 + 2)
    for first in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        index = first + tl.arange(0, TILE)
        token_ids = tl.load(text + index, mask=index < length, other=0)
        taken = tl.atomic_xchg(own + token_ids, 0, mask=index < length)
        is_mine = (index < length) & (taken != 0)
        out = logits + place * stride + token_ids
        x = tl.load(out, mask=is_mine, other=0.0).to(tl.float32)
        x *= tl.where(x > 0, tl.div_rn(1.0, repetition), repetition)
        count = (taken & (_IN_PROMPT - 1)).to(tl.float32)
        x -= count * frequency + tl.where(count > 0, presence, 0.0)
        tl.store(out, x.to(logits.dtype.element_ty), mask=is_mine)


def penalise(
    logits: Tensor,
    penalised: Penalised,
    rows: Tensor,
    positions: Tensor,
    tokens: Tensor,
    num_prompt_tokens: Tensor,
) -> None:
    """Repetition penalty over the text, then the others over its completion."""
    vocab_size, capacity = logits.shape[1], tokens.shape[1]
    counts, size = penalised.counts, len(penalised.counts)
    programs = min(_HISTORY_PROGRAMS, triton.cdiv(capacity, _TILE))
    for first in range(0, len(penalised.places), size):
        places = penalised.places[first : first + size]
        values = penalised.values[first : first + size]
        text = (places, rows, positions, tokens, num_prompt_tokens)
        grid = (len(places), programs)
        _count_kernel[grid](counts, *text, vocab_size, capacity, TILE=_TILE)
        _penalise_kernel[grid](
            *(logits, counts, values, *text, vocab_size, logits.stride(0), capacity), TILE=_TILE
        )


def variants() -> tuple[Variant, ...]:
    """For float32 and bfloat16 logits; nothing depends on the model."""
    text = dict.fromkeys(("rows", "positions", "tokens", "num_prompt_tokens"), "*i32")
    sizes = dict.fromkeys(("vocab_size", "stride", "capacity", "width"), "i32")
    forms = {
        "allowed": (_allowed_kernel, dict.fromkeys(("places", "words"), "*i32"), _TILE),
        "forbid": (
            _forbid_kernel,
            {
                **dict.fromkeys(("table", "after"), "*i32"),
                **text,
                "num_bans": "i32",
                "longest": "i32",
            },
            128,
        ),
        "add": (_add_kernel, {"where": "*i32", "values": "*fp32", "num_biases": "i32"}, 128),
        "count": (_count_kernel, dict.fromkeys(("counts", "places"), "*i32") | text, _TILE),
        "penalise": (
            _penalise_kernel,
            dict.fromkeys(("counts", "places"), "*i32") | {"values": "*fp32"} | text,
            _TILE,
        ),
    }
    return tuple(
        Variant(
            f"edits_{name}-{dtype}",
            kernel,
            {
                argument: type_
                for argument, type_ in {"logits": f"*{dtype}", **types, **sizes}.items()
                if argument in kernel.arg_names
            },
            {"TILE": tile},
        )
        for name, (kernel, types, tile) in forms.items()
        for dtype in ("fp32", "bf16")
        if dtype == "fp32" or "logits" in kernel.arg_names
    )
