"""Limits and habits of the scheduler, fixed for the life of an engine.

Knows nothing of models, devices or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_traits import ConfigError

Policy = Literal["fcfs", "priority", "shortest"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How an engine shares a backend among its requests.

    Attributes:
        policy: Who is admitted first: `fcfs`, lowest `priority`, or `shortest` prompt. The last
            two age, so that nobody waits for ever.
        max_batch_tokens: Token budget of a step, at least one block; None is the backend's limit.
        max_sequences: Sequences running at once; None is the backend's limit.
        max_waiting: Requests that may wait for admission before new ones are refused.
        overlap: Plan the next step while the backend works on this one: two batches in flight.
        prefix_cache: Reuse blocks of equal prefixes.
        watermark: Share of the blocks kept free at admission, so that running sequences can grow.
        max_preemptions: After this many a request is admitted with all the blocks it can ever
            need, and is never preempted again.
        num_ngram_drafts: Drafts looked up in the sequence's own tokens; 0 is off. Such a sequence
            does not overlap with itself, because a draft follows the newest token.
        priority_ageing_s: Seconds of waiting that are worth one level of priority.
        shortest_ageing_tokens: Prompt tokens that one second of waiting is worth.
        session_ttl_s: Seconds a session's blocks stay pinned after its last request.
        max_session_share: Largest share of the blocks that sessions may pin together.
    """

    policy: Policy = "fcfs"
    max_batch_tokens: int | None = None
    max_sequences: int | None = None
    max_waiting: int = 1024
    overlap: bool = True
    prefix_cache: bool = True
    watermark: float = 0.01
    max_preemptions: int = 8
    num_ngram_drafts: int = 0
    priority_ageing_s: float = 10.0
    shortest_ageing_tokens: float = 1000.0
    session_ttl_s: float = 1800.0
    max_session_share: float = 0.5

    def __post_init__(self) -> None:
        self._require(self.policy in ("fcfs", "priority", "shortest"), "policy", "known")
        self._require((self.max_batch_tokens or 1) >= 1, "max_batch_tokens", "at least 1")
        self._require((self.max_sequences or 1) >= 1, "max_sequences", "at least 1")
        self._require(self.max_waiting >= 1, "max_waiting", "at least 1")
        self._require(0 <= self.watermark < 1, "watermark", "in [0, 1)")
        self._require(self.max_preemptions >= 1, "max_preemptions", "at least 1")
        self._require(self.num_ngram_drafts >= 0, "num_ngram_drafts", "at least 0")
        self._require(self.priority_ageing_s > 0, "priority_ageing_s", "positive")
        self._require(self.shortest_ageing_tokens > 0, "shortest_ageing_tokens", "positive")
        self._require(self.session_ttl_s > 0, "session_ttl_s", "positive")
        self._require(0 <= self.max_session_share <= 1, "max_session_share", "in [0, 1]")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {rule}.")
