"""Decides who computes what in the next step, until its token budget is used up.

There are no phases: a sequence has positions still to compute, and a step computes some of them.
Prompt, chunked prompt, decode, draft verification and recompute are the same `Chunk`. Knows nothing
of batches in flight, nor of what comes back.
"""

from __future__ import annotations

import logging

from vllm_traits import BackendInfo, Chunk

from vllm_core.config import SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.scheduler.intake import Limits
from vllm_core.scheduler.plan import Plan
from vllm_core.scheduler.results import INTERNAL_ERROR
from vllm_core.scheduler.roster import Roster
from vllm_core.scheduler.sequence import Sequence

logger = logging.getLogger(__name__)


class Planner:
    """Shares a step among the sequences of a roster.

    Args:
        info: Limits of the backend.
        config: How often one request may be preempted.
        limits: Of a step.
        cache: The blocks.
        roster: The sequences.
        max_drafts: Most drafts that any chunk may verify.

    Attributes:
        draining: Memory ran out: nothing in flight may be left before room is made.
    """

    def __init__(
        self,
        info: BackendInfo,
        config: SchedulerConfig,
        limits: Limits,
        cache: KVCache,
        roster: Roster,
        max_drafts: int,
    ) -> None:
        self.draining = False
        self._prompt_waits = False  # decodes used up the budget: next time a prompt goes first
        self._block_size = info.block_size
        self._num_own_drafts = info.num_drafts
        self._max_preemptions = config.max_preemptions
        self._limits = limits
        self._cache = cache
        self._roster = roster
        self._max_drafts = max_drafts

    def start_over(self) -> None:
        """Forget what the last steps had no room for."""
        self.draining = self._prompt_waits = False

    def plan(self) -> Plan:
        """Decodes first, then prompts in progress, then new ones, until the budget is used up."""
        plan = Plan(self._limits.max_batch_tokens, self._block_size)
        reserved = self._block_size if self._prompt_waits else 0
        self._prompt_waits = self.draining = False
        plan.budget -= reserved
        prompts = self._plan_decodes(plan)
        plan.budget += reserved
        plan.num_decodes = len(plan.chunks)
        self._plan_prompts(plan, prompts)
        if not self.draining:
            self._admit(plan)
        return plan

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """The next token of every running sequence; returns those whose prompt is not done.

        The loop is the hot path of the engine, so what is steady is planned in place.
        """
        prompts: list[Sequence] = []
        chunks, sequences, grow = plan.chunks, plan.sequences, self._cache.grow
        for seq in self._decode_order(plan.budget):
            if not seq.steady:
                if self._is_prompt(seq):
                    prompts.append(seq)
                elif plan.budget > 0 and not self.draining:
                    self._plan_special_decode(plan, seq)
                continue
            start, pending = seq.computed, seq.pending
            if pending and len(seq.tokens) + pending >= seq.max_length:
                continue  # everything it may still produce is in flight
            if plan.budget <= 0 or self.draining:
                continue
            new_blocks: tuple[int, ...] = ()
            if start >= seq.table.capacity:
                grown = grow(seq.table, start + 1)
                if grown is None:
                    self.draining = True
                    continue
                new_blocks = grown
            plan.budget -= 1
            chunks.append(Chunk(seq.id, start, 1, new_blocks))
            sequences.append(seq)
            seq.computed = start + 1
            seq.pending = pending + 1
            seq.in_flight += 1
        return prompts

    def _decode_order(self, budget: int) -> list[Sequence]:
        """Order of admission; if the budget may not suffice, who waited longest for a token."""
        if len(self._roster.running) * (1 + self._max_drafts) <= budget:
            return list(self._roster.running.values())
        return sorted(self._roster.running.values(), key=lambda seq: seq.times.last_token)

    @staticmethod
    def _is_prompt(seq: Sequence) -> bool:
        """More than the newest token is left to compute, in this step."""
        return not seq.paused and (seq.todo > 1 or (seq.todo == 1 and not seq.sampled))

    def _plan_special_decode(self, plan: Plan, seq: Sequence) -> None:
        """A decode that may carry drafts, a mask or logprobs."""
        if seq.paused or seq.is_fully_launched:
            return
        if seq.proposer is not None and seq.pending:
            return  # a draft of the host follows the newest token, which is in flight
        room = min(plan.budget - 1, seq.max_length - seq.num_launched - 1)
        num_drafts, draft_ids = self._drafts(seq, max(0, room))
        if seq.finished:
            return
        new_blocks = self._cache.grow(seq.table, seq.computed + 1 + num_drafts)
        if new_blocks is None and num_drafts:
            num_drafts, draft_ids = 0, ()
            new_blocks = self._cache.grow(seq.table, seq.computed + 1)
        if new_blocks is None:
            self.draining = True
            return
        plan.add(seq, 1 + num_drafts, new_blocks, (num_drafts, draft_ids))

    def _drafts(self, seq: Sequence, room: int) -> tuple[int, tuple[int, ...]]:
        """How many drafts the next chunk verifies, and which if the host guesses them."""
        if seq.request.grammar is not None:
            return 0, ()  # each draft would need a mask of its own
        if seq.proposer is None:
            return min(self._num_own_drafts, room), ()
        try:
            draft_ids = tuple(seq.proposer(seq.tokens)[:room])
        except Exception:
            logger.exception("the draft proposer of request %s failed", seq.request.id)
            self._roster.fail(seq, INTERNAL_ERROR)
            return 0, ()
        return len(draft_ids), draft_ids

    def _plan_prompts(self, plan: Plan, prompts: list[Sequence]) -> None:
        """Prompts in progress; their blocks were taken at admission."""
        for seq in prompts:
            num_tokens = plan.cut(seq)
            if num_tokens:
                plan.add(seq, num_tokens, ())
            else:
                self._prompt_waits = True

    def _admit(self, plan: Plan) -> None:
        """Start waiting sequences while rows, budget and blocks last; nobody is overtaken."""
        for seq in self._roster.waiting.candidates(holding_first=bool(self._cache.tiers)):
            if self._roster.num_rows >= self._limits.max_sequences:
                return
            if plan.budget < self._block_size:
                self._prompt_waits = True
                return
            if seq.paused:
                continue
            keep_free = self._limits.watermark if self._roster.running else 0
            held = self._cache.attach(seq.table, seq.tokens, keep_free)
            if held is None:
                continue  # a store is still loading its prefix
            seq.computed = held
            if not self._fit(seq, keep_free):
                return
            self._enter(plan, seq)

    def _fit(self, seq: Sequence, keep_free: int) -> bool:
        """Take blocks for everything it has to compute before it samples.

        One that was preempted too often takes all it can ever need, and never asks again.
        """
        reserves = seq.num_preemptions >= self._max_preemptions
        num_positions = seq.max_positions if reserves else len(seq.tokens)
        missing = self._cache.num_missing(seq.table, num_positions)
        if self._cache.make_available(missing + keep_free):
            self._cache.grow(seq.table, num_positions)
            return True
        if not seq.table.num_loaded:
            self._cache.release(seq.table)  # a hit costs nothing to find again; a load does
            seq.computed = 0
        return False

    def _enter(self, plan: Plan, seq: Sequence) -> None:
        """From waiting to running, with a first chunk."""
        self._roster.enter(seq)
        plan.start(seq)
        plan.add(seq, plan.cut(seq), tuple(seq.table.blocks))
