"""What came back of a step becomes confirmed tokens, published blocks and outputs.

One sequence that fails here, for whatever reason, ends alone.
"""

from __future__ import annotations

import logging

from vllm_traits import BatchOutput, Chunk, FinishReason, RequestOutput

from vllm_core.kv_cache.cache import KVCache
from vllm_core.metrics.stats import EngineStats
from vllm_core.scheduler.finish import Ending, confirm, ending
from vllm_core.scheduler.plan import Launched
from vllm_core.scheduler.roster import Roster
from vllm_core.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)

INTERNAL_ERROR = "internal_error"
GRAMMAR_ERROR = "grammar_error"


class ResultReader:
    """Reads the results of batches into the roster.

    Args:
        roster: Sequences and their states.
        cache: Where confirmed blocks are published.
        stats: What is counted.
        eos_token_ids: The model's end-of-sequence ids.
    """

    def __init__(
        self,
        roster: Roster,
        cache: KVCache,
        stats: EngineStats,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._roster = roster
        self._cache = cache
        self._stats = stats
        self._eos_token_ids = eos_token_ids

    def read(self, launched: Launched, output: BatchOutput, now: float) -> None:
        """Digest a batch that is no longer in flight."""
        for seq_id, code in output.failed.items():
            self._roster.fail(self._roster.sequences[seq_id], code)
        if output.cost is not None:
            self._stats.count_cost(output.cost)
        waits: dict[float, int] = {}  # time of the token before -> steady sequences
        for chunk, seq in zip(launched.batch.chunks, launched.sequences, strict=True):
            seq.in_flight -= 1
            try:
                if seq.steady:
                    self._read_steady(seq, output.token_ids[seq.id], now, waits)
                elif not seq.finished:
                    self._read(seq, chunk, output, now)
                elif not seq.in_flight:
                    self._roster.leave(seq)  # its last step under overlap was wasted
            except Exception:
                logger.exception("request %s failed while its step was read", seq.request.id)
                self._roster.fail(seq, INTERNAL_ERROR)
        for last_token, times in waits.items():
            self._stats.generation_tokens += times
            self._stats.inter_token_latency.observe(now - last_token, times)

    def _read_steady(
        self, seq: Sequence, new_tokens: tuple[int, ...], now: float, waits: dict[float, int]
    ) -> None:
        """One more token of a sequence with nothing special about it; the hot path."""
        (token,) = new_tokens
        seq.pending -= 1
        tokens, times = seq.tokens, seq.times
        tokens.append(token)
        waits[times.last_token] = waits.get(times.last_token, 0) + 1
        times.last_token = now
        num_tokens = len(tokens)
        if num_tokens > seq.table.publish_at:
            self._cache.publish(seq.table, tokens, num_tokens - 1)
        if token in seq.stop_ids or num_tokens >= seq.max_length:
            end = ending(seq, self._eos_token_ids)
            if end is not None:
                self._roster.finish(seq, end, new_tokens)
                return
        self._roster.outputs.append(
            RequestOutput(seq.request.id, new_tokens, None, None, seq.num_cached_tokens)
        )

    def _read(self, seq: Sequence, chunk: Chunk, output: BatchOutput, now: float) -> None:
        """Any other chunk."""
        end = chunk.start + chunk.num_tokens
        if seq.prompt_logprobs is not None:
            entries = output.prompt_logprobs.get(seq.id, ())
            seq.prompt_logprobs[chunk.start + 1 : chunk.start + 1 + len(entries)] = entries
        if chunk.sample and seq.generates:
            self._read_tokens(seq, chunk, output, now)
            return
        self._cache.publish(seq.table, seq.tokens, end)
        if end == seq.num_prompt and not seq.generates:
            self._count_prompt(seq)
            times = seq.times
            times.first_token = times.last_token = now
            reason = FinishReason.STOP if seq.is_pooling else FinishReason.LENGTH
            embedding = output.embeddings[seq.id] if seq.is_pooling else ()
            self._roster.finish(seq, Ending(reason), embedding=embedding)

    def _read_tokens(self, seq: Sequence, chunk: Chunk, output: BatchOutput, now: float) -> None:
        """Tokens were sampled: settle the optimistic counts, then see how far they count."""
        new_tokens = output.token_ids[seq.id]
        num_drafts = chunk.num_drafts
        assert 1 <= len(new_tokens) <= 1 + num_drafts, f"{len(new_tokens)} tokens for {chunk}"
        seq.pending -= 1 + num_drafts
        seq.computed -= 1 + num_drafts - len(new_tokens)
        if num_drafts:
            self._stats.count_drafts(num_drafts, len(new_tokens) - 1)
        self._count_prompt(seq)
        first = len(seq.tokens)
        try:
            end = confirm(seq, new_tokens, self._eos_token_ids)
        except Exception:
            logger.exception("the grammar of request %s failed", seq.request.id)
            end = Ending(FinishReason.ERROR, error=GRAMMAR_ERROR)
        kept = tuple(seq.tokens[first:])
        self._count_tokens(seq, len(kept), now)
        self._cache.publish(seq.table, seq.tokens, len(seq.tokens) - 1)  # the newest has no KV yet
        logprobs = output.logprobs.get(seq.id, ())[: len(kept)]
        if end is not None:
            self._roster.finish(seq, end, kept, logprobs)
            return
        seq.steady = seq.plain and not seq.paused
        self._roster.outputs.append(
            RequestOutput(
                request_id=seq.request.id,
                token_ids=kept,
                num_cached_tokens=seq.num_cached_tokens,
                logprobs=logprobs,
                prompt_logprobs=seq.take_prompt_logprobs(),
            )
        )

    def _count_prompt(self, seq: Sequence) -> None:
        if not seq.prompt_counted:
            seq.prompt_counted = True
            self._stats.count_prompt(seq.num_prompt, seq.num_cached_tokens)

    def _count_tokens(self, seq: Sequence, num_tokens: int, now: float) -> None:
        """Gaps are those the reader sees: tokens that arrive together share theirs."""
        if not num_tokens:
            return
        self._stats.generation_tokens += num_tokens
        times = seq.times
        if times.first_token is None:
            times.first_token = now
            self._stats.time_to_first_token.observe(now - times.arrived)
            num_gaps = num_tokens - 1  # arrived with the first
            if num_gaps:
                self._stats.inter_token_latency.observe(0.0, num_gaps)
        else:
            gap = (now - times.last_token) / num_tokens
            self._stats.inter_token_latency.observe(gap, num_tokens)
        times.last_token = now
