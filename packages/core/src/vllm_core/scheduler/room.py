"""Who gives way when blocks or rows run out. Called only while nothing is in flight.

Sessions give way first, then waiting sequences that hold loaded blocks, then running ones.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_core.config import SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.scheduler.roster import Roster
from vllm_core.scheduler.sequence import Sequence


class Room:
    """Takes blocks and rows from those who can best do without.

    Args:
        cache: The blocks.
        roster: Those who hold them.
        config: How often one request may be preempted.
    """

    def __init__(self, cache: KVCache, roster: Roster, config: SchedulerConfig) -> None:
        self._cache = cache
        self._roster = roster
        self._max_preemptions = config.max_preemptions

    def make(self) -> bool:
        """Free as many blocks as all running sequences need for their next token.

        Returns:
            Whether anything changed, or there was enough to begin with.
        """
        running = self._roster.running
        needed = sum(self._num_missing(seq) for seq in running.values())
        changed = False
        while not self._cache.make_available(needed):
            if not self._release_waiting():
                victim = self._victim(running.values())
                if victim is None:
                    return changed
                needed -= self._num_missing(victim)
                self._roster.preempt(victim)
            changed = True
        return True

    def _num_missing(self, seq: Sequence) -> int:
        if seq.paused or seq.is_fully_launched:
            return 0
        return self._cache.num_missing(seq.table, seq.computed + seq.todo)

    def unblock(self, out_of_blocks: bool) -> bool:
        """Nothing can be launched: let somebody give way to the first in line.

        Args:
            out_of_blocks: A running sequence could not grow.

        Returns:
            Whether planning again may go better.
        """
        if out_of_blocks:
            return self.make()
        first = self._first_in_line()
        if first is None or first.table.loading is not None or self._cache.tiers.copies:
            return False
        if self._release_waiting(keep=first):
            return True
        victim = self._victim(seq for seq in self._roster.running.values() if seq.paused)
        if victim is not None:
            self._roster.preempt(victim)
        return victim is not None

    def _first_in_line(self) -> Sequence | None:
        order = self._roster.waiting.candidates(holding_first=bool(self._cache.tiers))
        return next((seq for seq in order if not seq.paused), None)

    def _release_waiting(self, keep: Sequence | None = None) -> bool:
        """Take blocks from one waiting sequence that is not loading; the last in line first."""
        for seq in reversed(self._roster.waiting.candidates(holding_first=False)):
            if seq is not keep and seq.table.blocks and seq.table.loading is None:
                self._roster.let_go(seq)
                return True
        return False

    def _victim(self, among: Iterable[Sequence]) -> Sequence | None:
        """The newest of the least important that may still be preempted."""
        allowed = [seq for seq in among if seq.num_preemptions < self._max_preemptions]
        return max(reversed(allowed), key=lambda seq: seq.request.priority, default=None)
