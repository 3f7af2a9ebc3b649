"""A step while it is being planned: shares of the token budget become chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_traits import Batch, Chunk, Start

from vllm_core.scheduler.sequence import Sequence


@dataclass(slots=True)
class Launched:
    """A batch in flight and the sequences of its chunks, in the same order."""

    batch: Batch
    sequences: list[Sequence]


@dataclass(slots=True)
class Plan:
    """What the next batch holds so far.

    Attributes:
        budget: Positions that may still be added.
        block_size: Positions per block; chunks that end before the prompt does end on a border.
        chunks: Shares so far.
        sequences: Whose they are, in the same order.
        starts: Sequences that enter with this step.
        num_decodes: How many of the chunks are decodes; they come first.
    """

    budget: int
    block_size: int
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    sequences: list[Sequence] = field(default_factory=list[Sequence])
    starts: list[Start] = field(default_factory=list[Start])
    num_decodes: int = 0

    def cut(self, seq: Sequence) -> int:
        """Positions of a prompt that fit into the budget; 0 if it has to wait.

        Unless the rest fits, a chunk ends on the block grid, so that results do not depend on
        where it was cut.
        """
        todo = seq.todo
        if todo <= self.budget:
            return todo
        end = seq.computed + self.budget
        return max(0, end - end % self.block_size - seq.computed)

    def add(
        self,
        seq: Sequence,
        num_tokens: int,
        new_blocks: tuple[int, ...],
        drafts: tuple[int, tuple[int, ...]] = (0, ()),
    ) -> None:
        """Commit a share: from here on the sequence counts these positions as computed.

        Args:
            seq: The sequence.
            num_tokens: Positions, drafts included.
            new_blocks: What its table grew by.
            drafts: How many of the positions are drafts, and the host's guesses if it made them.
        """
        num_drafts, draft_ids = drafts
        start = seq.computed
        reaches_end = start + num_tokens - num_drafts == seq.num_launched
        sample = reaches_end and (seq.generates or seq.is_pooling)
        masked = sample and seq.request.grammar is not None
        chunk = Chunk(seq.id, start, num_tokens, new_blocks, num_drafts, draft_ids, sample, masked)
        self.chunks.append(chunk)
        self.sequences.append(seq)
        self.budget -= num_tokens
        seq.computed += num_tokens
        seq.in_flight += 1
        if sample and seq.generates:
            seq.pending += 1 + num_drafts
            seq.sampled = True

    def start(self, seq: Sequence) -> None:
        """Let a sequence enter the backend; its first chunk follows."""
        start = Start(
            seq_id=seq.id,
            token_ids=tuple(seq.tokens),
            params=seq.request.params,
            seed=seq.seed,
            num_prompt_tokens=seq.num_prompt,
            adapter=seq.request.adapter,
        )
        self.starts.append(start)
