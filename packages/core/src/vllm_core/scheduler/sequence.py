"""The life of one request inside the engine.

Two counters run at different speeds: `computed` and `pending` are optimistic and drive memory;
`tokens`, which the host has seen, alone drive keys, stop conditions, grammar and outputs.

    tokens     |-- prompt --|-- completion so far --|
    pending                                         |-- launched, not seen --|
    computed   |-------------- KV there or in flight ------------|
    to compute                                                   |-----------|
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_traits import PoolingParams, Request, SamplingParams, TokenLogprobs

from vllm_core.kv_cache.table import BlockTable
from vllm_core.metrics.stats import RequestTimes
from vllm_core.scheduler.propose import Proposer

SCORING = SamplingParams(max_tokens=0)  # how a pooling request looks to whoever counts tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """One request, what is known of it and where it stands.

    Attributes:
        id: Its name towards the backend.
        request: What the user asked.
        params: Its sampling; for a pooling request one that generates nothing.
        seed: Key of its random numbers, repeated whenever it starts again.
        max_length: Tokens, prompt included, at which it ends.
        stop_ids: Tokens that end it.
        table: Its blocks.
        times: When things happened to it.
        tokens: Confirmed tokens, prompt first.
        computed: Positions computed or in flight, drafts assumed accepted.
        pending: Tokens sampled but not seen yet, at most.
        in_flight: Launched batches that mention it.
        started: Whether the backend has a row for it.
        sampled: Whether it sampled since it started; a backend has drafts only then.
        steady: It decodes one token a step with nothing special about it.
        plain: It may become steady: no drafts, grammar or logprobs.
        paused: Its reader is too slow; it keeps what it has and is not scheduled.
        finished: Its last output was made.
        proposer: Where drafts of the host come from.
        num_preemptions: How often it was released to make room.
        num_cached_tokens: Prompt tokens that were not computed at its first admission.
        prompt_logprobs: One per prompt token, filled as chunks arrive; None if not asked for, or
            handed out.
    """

    id: int
    request: Request
    params: SamplingParams
    seed: int
    max_length: int
    stop_ids: frozenset[int]
    table: BlockTable
    times: RequestTimes
    tokens: list[int]
    proposer: Proposer | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    computed: int = 0
    pending: int = 0
    in_flight: int = 0
    started: bool = False
    sampled: bool = False
    steady: bool = False
    plain: bool = False
    paused: bool = False
    finished: bool = False
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    prompt_counted: bool = False
    num_prompt: int = field(init=False)
    is_pooling: bool = field(init=False)
    generates: bool = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.request.token_ids)
        self.is_pooling = isinstance(self.request.params, PoolingParams)
        self.generates = self.params.max_tokens > 0

    @property
    def num_launched(self) -> int:
        """Tokens it will have when everything in flight is seen, at most."""
        return len(self.tokens) + self.pending

    @property
    def todo(self) -> int:
        """Positions still to compute, counting tokens the host has not seen."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def is_fully_launched(self) -> bool:
        """Everything it may still produce is in flight."""
        return self.todo <= 0 or (self.pending > 0 and self.num_launched >= self.max_length)

    @property
    def max_positions(self) -> int:
        """Positions it can ever compute; the last token of a completion is never read."""
        return self.max_length - 1 if self.generates else self.num_prompt

    def expect_prompt_logprobs(self) -> None:
        """Collect them from now on; there is none for the first token."""
        self.prompt_logprobs = [None for _ in range(self.num_prompt)]

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """Hand out what was collected, once; nothing if the prompt was not computed to its end."""
        collected, self.prompt_logprobs = self.prompt_logprobs, None
        return tuple(collected) if collected is not None and self.prompt_counted else ()

    def forget_backend(self) -> None:
        """Back to its confirmed tokens, as far as counters go."""
        self.computed = self.pending = 0
        self.started = self.sampled = self.steady = False


def sampling_of(request: Request) -> SamplingParams:
    """How tokens of a request are counted and reported."""
    if isinstance(request.params, PoolingParams):
        return SCORING
    return request.params
