"""Sessions: references on the blocks a conversation used last, so that its next turn finds them.

A pin is found by content like any other prefix; a session id only keeps it from being reused.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from vllm_core.kv_cache.keys import KeyChain
from vllm_core.kv_cache.pool import BlockPool

SessionKey = tuple[bytes, str]  # salt and session id: tenants cannot touch each other's pins


class Pin(NamedTuple):
    """Blocks held for a session until a time of the injected clock."""

    blocks: list[int]
    expires_at: float


class Sessions:
    """Pins by session, the longest unused first.

    Args:
        pool: Holder of the references.
        max_blocks: Most references all sessions may hold together.
        ttl_s: Seconds that a pin outlives its last use.
    """

    def __init__(self, pool: BlockPool, max_blocks: int, ttl_s: float) -> None:
        self.pins: OrderedDict[SessionKey, Pin] = OrderedDict()
        self.num_pinned = 0
        self._pool = pool
        self._max_blocks = max_blocks
        self._ttl_s = ttl_s

    def pin(self, session: SessionKey, chain: KeyChain, now: float) -> None:
        """Replace what a session holds by the longest present run of a chain.

        A chain above the limit is held up to it; older sessions make way for newer ones.
        """
        blocks, _ = self._pool.match(chain, self._max_blocks)
        self._pool.share(blocks)
        self._unpin(session)
        if not blocks:
            return
        while self.num_pinned + len(blocks) > self._max_blocks:
            self.drop_oldest()
        self.pins[session] = Pin(blocks, now + self._ttl_s)
        self.num_pinned += len(blocks)

    def expire(self, now: float) -> None:
        """Drop pins whose time is over."""
        while self.pins:
            oldest = next(iter(self.pins.values()))
            if oldest.expires_at > now:
                return
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Drop the pin that was not used for longest; False if there is none."""
        for session in self.pins:
            self._unpin(session)
            return True
        return False

    def clear(self) -> None:
        """Drop every pin."""
        while self.drop_oldest():
            pass

    def _unpin(self, session: SessionKey) -> None:
        pin = self.pins.pop(session, None)
        if pin is not None:
            self.num_pinned -= len(pin.blocks)
            self._pool.drop(pin.blocks)
