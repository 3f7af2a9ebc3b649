"""Who is admitted next. Knows the order, not what admission costs."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from vllm_core.config import SchedulerConfig
from vllm_core.scheduler.sequence import Sequence

Rank = tuple[float, float, int]  # compared in order, lowest first


class WaitingQueue:
    """Waiting sequences in the order of the policy.

    Ageing needs no clock: to compare `priority - waited / ageing` at one moment is to compare
    `priority + arrived / ageing`, which never changes. So every rank is fixed when it enters.

    A preempted sequence goes to the head; under the priority policy to the head of its priority,
    or it would keep more important ones waiting for memory.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._order: list[tuple[Rank, Sequence]] = []
        self.num_newcomers = 0  # never admitted: those a bound on the queue is about

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq in self._order)

    def push(self, seq: Sequence) -> None:
        """Enter a sequence."""
        insort(self._order, (self._rank(seq), seq))
        self.num_newcomers += seq.times.admitted is None

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that is in."""
        index = bisect_left(self._order, self._rank(seq), key=lambda item: item[0])
        assert self._order[index][1] is seq, f"sequence {seq.id} is not waiting"
        del self._order[index]
        self.num_newcomers -= seq.times.admitted is None

    def candidates(self, holding_first: bool) -> list[Sequence]:
        """Who to try to admit, in order.

        With `holding_first` those that hold blocks come first: behind a head that waits for
        memory they would keep theirs for ever.
        """
        order = [seq for _, seq in self._order]
        if not holding_first:
            return order
        holding = [seq for seq in order if seq.table.blocks]
        if not holding:
            return order
        return list(chain(holding, (seq for seq in order if not seq.table.blocks)))

    def _rank(self, seq: Sequence) -> Rank:
        """Distinct for every sequence and constant while it waits."""
        newcomer = float(seq.times.admitted is None)
        arrived = seq.times.arrived
        match self._config.policy:
            case "fcfs":
                return newcomer, 0.0, seq.id
            case "priority":
                level = seq.request.priority + arrived / self._config.priority_ageing_s
                return level, newcomer, seq.id
            case "shortest":
                length = seq.num_prompt + arrived * self._config.shortest_ageing_tokens
                return newcomer, length, seq.id
