"""Everything the engine counts, exact to the token.

Counters and histograms grow as things happen; gauges are filled in when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import product

from vllm_traits import FinishReason, StepCost

from vllm_core.metrics.histogram import Histogram

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_BUCKETS = (1.0, *(float(1 << power) for power in range(3, 15)))
PREEMPTION_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


def count_buckets(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `limit` inclusive."""
    series = (step * 10**power for power, step in product(range(len(str(limit))), (1, 2, 5)))
    return tuple(float(bound) for bound in series if bound <= limit)


@dataclass(slots=True)
class RequestTimes:
    """When things happened to a request, in seconds of the engine's clock; None: not yet."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float = 0.0


@dataclass(slots=True)
class EngineStats:
    """Counters, histograms and gauges of one engine.

    At every moment `received` equals the sum of `finished` plus `num_in_flight`.

    Attributes:
        max_model_len: Bound of the token-count buckets.
        received: Requests accepted by `add`.
        rejected_queue_full: Requests refused because too many were waiting.
        finished: Requests by the reason they ended.
        prompt_tokens: Prompt tokens of requests whose prompt was computed.
        cached_prompt_tokens: Those of them found in the prefix cache or a store.
        generation_tokens: Completion tokens handed out.
        prefix_cache_queries: Prompt tokens looked up in the prefix cache.
        prefix_cache_hits: Prompt tokens found there.
        preemptions: Sequences released to make room, to be computed again.
        spec_drafts: Chunks that verified drafts.
        spec_draft_tokens: Drafts verified.
        spec_accepted_tokens: Drafts accepted.
        spec_accepted_per_position: The same by place in the chunk.
        loaded_blocks: Blocks that stores brought.
        saved_blocks: Blocks that stores kept.
        store_faults: Calls to a store that raised.
        batch_faults: Batches that failed as a whole.
        steps: Batches launched.
        mixed_steps: Batches with decodes beside prompt chunks.
        cost_bytes: Bytes moved, as far as the backend reports them.
        cost_flops: Floating-point operations, likewise.
        device_seconds: Time the device was busy, likewise.
        num_running: Gauge: sequences in the backend.
        num_waiting: Gauge: requests waiting for admission.
        num_in_flight: Gauge: requests accepted and not finished.
        kv_usage: Gauge: share of the blocks that somebody holds, 0 to 1.
        cached_blocks: Gauge: blocks nobody holds whose content can be found.
        sessions: Gauge: sessions with pinned blocks.
        pinned_blocks: Gauge: references held by sessions.
    """

    max_model_len: int
    received: int = 0
    rejected_queue_full: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    preemptions: int = 0
    spec_drafts: int = 0
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0
    spec_accepted_per_position: list[int] = field(default_factory=list[int])
    loaded_blocks: int = 0
    saved_blocks: int = 0
    store_faults: int = 0
    batch_faults: int = 0
    steps: int = 0
    mixed_steps: int = 0
    cost_bytes: int = 0
    cost_flops: int = 0
    device_seconds: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    num_in_flight: int = 0
    kv_usage: float = 0.0
    cached_blocks: int = 0
    sessions: int = 0
    pinned_blocks: int = 0
    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(TTFT_BUCKETS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    time_per_output_token: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    e2e_latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    queue_time: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    inference_time: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    prefill_time: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    decode_time: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS))
    iteration_tokens: Histogram = field(default_factory=lambda: Histogram(ITERATION_BUCKETS))
    num_preemptions: Histogram = field(default_factory=lambda: Histogram(PREEMPTION_BUCKETS))
    request_prompt_tokens: Histogram = field(init=False)
    request_generation_tokens: Histogram = field(init=False)
    params_max_tokens: Histogram = field(init=False)
    prefill_computed_tokens: Histogram = field(init=False)

    def __post_init__(self) -> None:
        buckets = count_buckets(self.max_model_len)
        self.request_prompt_tokens = Histogram(buckets)
        self.request_generation_tokens = Histogram(buckets)
        self.params_max_tokens = Histogram(buckets)
        self.prefill_computed_tokens = Histogram(buckets)

    def histograms(self) -> Iterator[tuple[str, Histogram]]:
        """Every histogram with its field name."""
        for each in fields(self):
            value: object = getattr(self, each.name)
            if isinstance(value, Histogram):
                yield each.name, value

    def copy(self) -> EngineStats:
        """An independent copy."""
        twin = EngineStats(self.max_model_len)
        for each in fields(self):
            value: object = getattr(self, each.name)
            match value:
                case Histogram() | dict() | list():
                    setattr(twin, each.name, value.copy())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
                case _:
                    setattr(twin, each.name, value)
        return twin

    def count_prompt(self, num_tokens: int, num_cached: int) -> None:
        """A prompt was computed to its end."""
        self.prompt_tokens += num_tokens
        self.cached_prompt_tokens += num_cached
        self.request_prompt_tokens.observe(num_tokens)
        self.prefill_computed_tokens.observe(num_tokens - num_cached)

    def count_drafts(self, num_drafts: int, num_accepted: int) -> None:
        """A chunk verified drafts."""
        self.spec_drafts += 1
        self.spec_draft_tokens += num_drafts
        self.spec_accepted_tokens += num_accepted
        per_position = self.spec_accepted_per_position
        per_position.extend([0] * (num_drafts - len(per_position)))
        for position in range(num_accepted):
            per_position[position] += 1

    def count_cost(self, cost: StepCost) -> None:
        """A backend reported what a step did."""
        self.cost_bytes += cost.bytes_moved
        self.cost_flops += cost.flops
        self.device_seconds += cost.device_seconds

    def count_finish(
        self, reason: FinishReason, times: RequestTimes, now: float, num_tokens: int
    ) -> None:
        """A request ended, after `num_tokens` completion tokens."""
        self.finished[reason] += 1
        self.e2e_latency.observe(now - times.arrived)
        self.request_generation_tokens.observe(num_tokens)
        if times.admitted is None:
            return
        self.inference_time.observe(now - times.admitted)
        if times.first_token is None:
            return
        self.prefill_time.observe(times.first_token - times.admitted)
        decode = times.last_token - times.first_token
        self.decode_time.observe(decode)
        if num_tokens > 1:
            self.time_per_output_token.observe(decode / (num_tokens - 1))
