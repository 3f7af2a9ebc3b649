"""A simulated model that stores tokens by block and samples from what it finds there.

The "model" is a hash of the context, read back through the block table: a wrong block, position,
order or length changes the text. Every promise of the protocol that it can see is asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from vllm_traits import (
    BackendInfo,
    Batch,
    BatchOutput,
    Chunk,
    PoolingParams,
    SamplingParams,
    Start,
    TokenLogprobs,
)

from vllm_core.testing.in_flight import SampledOnce


def next_token(context: Sequence[int], seed: int = 0) -> int:
    """The model: a token from 1 to 50 that depends on every token before it and its place."""
    state = 7 + seed % 1009
    for index, token in enumerate(context):
        state = (state * 31 + token * (index + 1)) % 100003
    return state % 50 + 1


def constrain(token: int, mask: bytes) -> int:
    """The nearest allowed token, searching upwards and around."""
    num_tokens = len(mask) * 8
    while not (mask[token >> 3] >> (token & 7)) & 1:
        token = (token + 1) % num_tokens
    return token


class Countdown:
    """A transfer that completes on its own after so many ticks; being polled is one, too."""

    def __init__(self, ticks: int, value: int, copy: Callable[[], None]) -> None:
        self._ticks = ticks
        self._value = value
        self._copy = copy

    def tick(self) -> None:
        """Time passes; the copy happens once, at the end."""
        self._ticks -= 1
        if self._ticks == 0:
            self._copy()

    def done(self) -> bool:
        """Whether the copy has happened."""
        self.tick()
        return self._ticks <= 0

    def result(self) -> int:
        """Blocks that were copied."""
        while not self.done():
            pass
        return self._value


class DictStore:
    """Blocks by key in a dictionary, which several backends may share.

    Args:
        delay: Ticks until a copy is done: polls of it and steps of the backend.
        contents: Where blocks are kept.
        arriving: Share of the blocks of a load that arrive; the rest is lost.
    """

    def __init__(
        self,
        delay: int = 2,
        contents: dict[bytes, list[int]] | None = None,
        arriving: float = 1.0,
    ) -> None:
        self.contents: dict[bytes, list[int]] = {} if contents is None else contents
        self._delay = delay
        self._arriving = arriving
        self._backend: SimBackend | None = None
        self._copies: list[Countdown] = []

    def bind(self, backend: SimBackend) -> None:
        """Say whose blocks it copies."""
        self._backend = backend

    def tick(self) -> None:
        """A step has passed; copies go on whether or not anybody asks."""
        for copy in self._copies:
            copy.tick()

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are held."""
        for held, key in enumerate(keys):
            if key not in self.contents:
                return held
        return len(keys)

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Countdown:
        """Copy at the last moment, so that a block given to somebody else too early is noticed."""
        backend = self._bound()
        found = [self.contents[key] for key in keys]
        arriving = int(len(keys) * self._arriving)

        def copy() -> None:
            for block, tokens in zip(blocks[:arriving], found, strict=False):
                backend.write_block(block, tokens)

        return self._begin(arriving, copy)

    def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Countdown:
        """Copy at the last moment, so that a block reused too early is noticed."""
        backend = self._bound()
        held, targets = list(blocks), list(keys)

        def copy() -> None:
            for key, block in zip(targets, held, strict=True):
                self.contents[key] = backend.read_block(block)

        return self._begin(len(targets), copy)

    def _begin(self, num_blocks: int, copy: Callable[[], None]) -> Countdown:
        begun = Countdown(self._delay, num_blocks, copy)
        self._copies.append(begun)
        return begun

    def _bound(self) -> SimBackend:
        assert self._backend is not None, "bind() comes first"
        return self._backend


@dataclass(slots=True)
class Row:
    """What the backend keeps for one sequence."""

    start: Start
    tokens: list[int]
    blocks: list[int] = field(default_factory=list[int])
    computed: int | None = None  # unknown until the first chunk says where it starts
    own_drafts: tuple[int, ...] = ()  # proposed after the last sample
    verifying: tuple[int, ...] = ()  # drafts of the chunk being computed
    has_sampled: bool = False


class SimBackend:
    """Checks every promise of the protocol while it runs it.

    Args:
        info: Limits; `num_drafts` drafts are proposed after each sample, two in three right.
        stores: Stores that copy this backend's blocks.
    """

    def __init__(self, info: BackendInfo, stores: Sequence[DictStore] = ()) -> None:
        self.info = info
        self.stores = tuple(stores)
        self.num_steps = 0
        self.rows: dict[int, Row] = {}
        self._kv: dict[tuple[int, int], int] = {}  # (block, offset) -> token
        self._last_step = 0
        for store in stores:
            store.bind(self)

    def forward(self, batch: Batch) -> SampledOnce:
        """Apply released, starts and chunks in this order."""
        assert batch.step > self._last_step, "steps count up"
        self._last_step = batch.step
        for seq_id in batch.released:
            del self.rows[seq_id]
        for start in batch.starts:
            assert start.seq_id not in self.rows, f"sequence {start.seq_id} started twice"
            self.rows[start.seq_id] = Row(start, list(start.token_ids))
        assert len(self.rows) <= self.info.max_sequences, "more rows than declared"
        total = sum(chunk.num_tokens for chunk in batch.chunks)
        assert 0 < total <= self.info.max_batch_tokens, f"a step of {total} tokens"
        for chunk in batch.chunks:
            self._compute(chunk, self.rows[chunk.seq_id])
        self.num_steps += 1
        for store in self.stores:
            store.tick()
        return SampledOnce(partial(self.answer, batch))

    def close(self) -> None:
        """Drop every row."""
        self.rows.clear()

    def _compute(self, chunk: Chunk, row: Row) -> None:
        assert chunk.num_tokens >= 1, "a chunk is never empty"
        row.blocks += chunk.new_blocks
        if row.computed is None:
            row.computed = chunk.start
        assert chunk.start >= row.computed, f"{chunk} skips positions after {row.computed}"
        assert row.has_sampled or chunk.start == row.computed, f"{chunk} is ahead of its sequence"
        start = row.computed  # the host assumed drafts accepted; the backend knows better
        known = row.tokens[start : start + chunk.num_tokens - chunk.num_drafts]
        assert row.has_sampled or not chunk.num_drafts, "drafts before any sample"
        row.verifying = tuple(chunk.draft_ids or row.own_drafts[: chunk.num_drafts])
        assert len(known) + len(row.verifying) == chunk.num_tokens, f"{chunk} asks for more"
        for offset, token in enumerate([*known, *row.verifying]):
            self._write(row, start + offset, token)
        row.computed = start + chunk.num_tokens
        at_end = row.computed >= len(row.tokens)
        on_grid = row.computed % self.info.block_size == 0
        assert chunk.sample or at_end or on_grid, f"{chunk} ends off the block grid"

    def answer(self, batch: Batch, masks: Mapping[int, bytes]) -> BatchOutput:
        """Sample every chunk that asks for it."""
        token_ids: dict[int, tuple[int, ...]] = {}
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        for chunk in batch.chunks:
            row = self.rows[chunk.seq_id]
            params = row.start.params
            assert chunk.masked == (chunk.seq_id in masks), f"{chunk} and its mask disagree"
            if isinstance(params, PoolingParams):
                if chunk.sample:
                    embeddings[chunk.seq_id] = self._vector(row)
                continue
            if params.prompt_logprobs is not None:
                prompt_logprobs[chunk.seq_id] = self._score(row, chunk)
            if chunk.sample:
                said = self._sample(chunk, row, params, masks.get(chunk.seq_id))
                token_ids[chunk.seq_id] = said
                if params.logprobs is not None:
                    logprobs[chunk.seq_id] = tuple(TokenLogprobs(t, -t / 64, 1) for t in said)
        return BatchOutput(token_ids, logprobs, prompt_logprobs, embeddings)

    def _sample(
        self, chunk: Chunk, row: Row, params: SamplingParams, mask: bytes | None
    ) -> tuple[int, ...]:
        """Sample after each verified draft until one is wrong; then propose new drafts."""
        assert row.computed is not None, "sampling before any chunk"
        length = row.computed - chunk.num_drafts
        sampled: list[int] = []
        for index in range(chunk.num_drafts + 1):
            token = self._next(row, length + index, params)
            if mask is not None:
                token = constrain(token, mask)
            sampled.append(token)
            if index == chunk.num_drafts or row.verifying[index] != token:
                break
        row.computed -= chunk.num_drafts + 1 - len(sampled)
        row.tokens += sampled
        row.has_sampled = True
        row.own_drafts = self._draft(row.tokens, row.start.seed)
        return tuple(sampled)

    def _next(self, row: Row, length: int, params: SamplingParams) -> int:
        """A token of the model, moved past stop ids while there are fewer than `min_tokens`."""
        token = next_token(self._context(row, length), row.start.seed)
        if length - row.start.num_prompt_tokens < params.min_tokens:
            while token in self.info.eos_token_ids or token in params.stop_token_ids:
                token = token % 50 + 1
        return token

    def _draft(self, tokens: Sequence[int], seed: int) -> tuple[int, ...]:
        """A draft model that is right two times in three."""
        context = list(tokens)
        drafts: list[int] = []
        for _ in range(self.info.num_drafts):
            token = next_token(context, seed)
            drafts.append(token if len(context) % 3 else token % 50 + 1)
            context.append(drafts[-1])
        return tuple(drafts)

    def _score(self, row: Row, chunk: Chunk) -> tuple[TokenLogprobs, ...]:
        """One entry for each computed position that a prompt token follows."""
        prompt = row.start.token_ids[: row.start.num_prompt_tokens]
        end = min(chunk.start + chunk.num_tokens, len(prompt) - 1)
        entries: list[TokenLogprobs] = []
        for position in range(chunk.start, end):
            state = next_token(self._context(row, position + 1))
            entries.append(TokenLogprobs(prompt[position + 1], -float(state), 1))
        return tuple(entries)

    def _vector(self, row: Row) -> tuple[float, ...]:
        return (float(next_token(self._context(row, len(row.tokens)))),)

    def _write(self, row: Row, position: int, token: int) -> None:
        index, offset = divmod(position, self.info.block_size)
        self._kv[row.blocks[index], offset] = token

    def _context(self, row: Row, length: int) -> list[int]:
        size = self.info.block_size
        return [self._kv[row.blocks[p // size], p % size] for p in range(length)]

    def read_block(self, block: int) -> list[int]:
        """Tokens whose KV a block holds."""
        return [self._kv[block, offset] for offset in range(self.info.block_size)]

    def write_block(self, block: int, tokens: Sequence[int]) -> None:
        """Replace what a block holds."""
        for offset, token in enumerate(tokens):
            self._kv[block, offset] = token
