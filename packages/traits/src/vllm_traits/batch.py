"""One step of the engine: what a backend is asked to compute, and what it answers.

Everything is immutable and made of ints, strings, bytes and tuples. The rules that bind the two
sides are in `vllm_traits.backend.ModelBackend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from vllm_traits.request import PoolingParams, SamplingParams, TokenLogprobs

EMPTY: Mapping[Any, Any] = MappingProxyType({})


class Start(NamedTuple):
    """A sequence enters the backend; sent once per admission.

    Attributes:
        seq_id: Never reused for another sequence.
        token_ids: All it has: the prompt, and the completion so far if it was preempted.
        params: Sampling or pooling.
        seed: Key of its random numbers; always set by the engine.
        num_prompt_tokens: How many of `token_ids` are prompt (penalties treat them differently).
        adapter: Name of a LoRA adapter.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams
    seed: int = 0
    num_prompt_tokens: int = 0
    adapter: str | None = None


class Chunk(NamedTuple):
    """One sequence's share of a step: compute positions [start, start + num_tokens).

    Attributes:
        seq_id: The sequence.
        start: First position to compute; everything before it is in the sequence's blocks.
        num_tokens: At least 1, drafts included.
        new_blocks: Appended to its block table; tables only ever grow.
        num_drafts: The last this many positions verify guesses.
        draft_ids: The guesses; empty means the ones the backend proposed itself.
        sample: False while more of the prompt follows; True asks for a token, or for the vector
            of a pooling request.
        masked: Sampling must wait for a mask.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_blocks: tuple[int, ...] = ()
    num_drafts: int = 0
    draft_ids: tuple[int, ...] = ()
    sample: bool = True
    masked: bool = False


class Batch(NamedTuple):
    """One step. Applied in the order released, starts, chunks.

    Attributes:
        chunks: At most one per sequence.
        starts: Sequences that enter.
        released: Sequences whose state is dropped (finished, aborted or preempted).
        step: Counts up by one.
    """

    chunks: tuple[Chunk, ...]
    starts: tuple[Start, ...] = ()
    released: tuple[int, ...] = ()
    step: int = 0


class StepCost(NamedTuple):
    """What a step had to do, for the share of the hardware limit that it reached.

    Attributes:
        bytes_moved: Weights, KV read and written, logits.
        flops: Floating-point operations of matrix products and attention.
        num_kernels: Launches.
        device_seconds: Time the device was busy.
    """

    bytes_moved: int
    flops: int
    num_kernels: int
    device_seconds: float


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """What a step produced, by sequence.

    Attributes:
        token_ids: 1 to 1 + num_drafts tokens for each sequence that sampled.
        logprobs: One entry per token, for sequences that asked.
        prompt_logprobs: One entry per computed position p of the chunk that has a known next
            prompt token: the log-probabilities of the token at p + 1.
        embeddings: The vector of each pooling sequence whose last chunk this was.
        failed: Sequences that failed alone, with an error code; they have no other entry.
        cost: For the live roofline figure.
    """

    token_ids: Mapping[int, tuple[int, ...]]
    logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=lambda: EMPTY)
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs, ...]] = field(default_factory=lambda: EMPTY)
    embeddings: Mapping[int, tuple[float, ...]] = field(default_factory=lambda: EMPTY)
    failed: Mapping[int, str] = field(default_factory=lambda: EMPTY)
    cost: StepCost | None = None
