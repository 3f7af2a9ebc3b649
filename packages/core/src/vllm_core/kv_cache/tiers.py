"""Copies between the pool and stores that nobody waits for; they only hold their blocks.

A store that fails is a cache miss: it is counted and never raised.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from vllm_traits import BlockStore, Pending

from vllm_core.kv_cache.pool import BlockPool

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Tiers:
    """The stores beside a pool, nearest first.

    Attributes:
        copies: Unfinished copies and the blocks each holds.
        num_saved: Blocks that a store kept.
        num_loaded: Blocks that a store brought to somebody who waited for them.
        num_faults: Store calls that raised.
    """

    def __init__(self, pool: BlockPool, stores: Sequence[BlockStore]) -> None:
        self.copies: list[tuple[Pending[int], list[int]]] = []
        self.num_saved = 0
        self.num_loaded = 0
        self.num_faults = 0
        self._pool = pool
        self._stores = tuple(stores)

    def __bool__(self) -> bool:
        return bool(self._stores)

    def find(self, keys: Sequence[bytes]) -> tuple[BlockStore, int] | None:
        """The nearest store that holds at least the first key, and how many it holds."""
        for store in self._stores:
            held = self._attempt(partial(store.lookup, keys), 0)
            if held:
                return store, min(held, len(keys))
        return None

    def load(
        self, store: BlockStore, keys: Sequence[bytes], blocks: Sequence[int]
    ) -> Pending[int] | None:
        """Begin to copy stored blocks into held ones; None if the store failed at once."""
        return self._attempt(partial(store.load, keys, blocks), None)

    def arrived(self, copy: Pending[int]) -> int | None:
        """Leading blocks that a copy brought; None while it is under way."""
        return self._attempt(lambda: copy.result() if copy.done() else None, 0)

    def save(self, keys: Sequence[bytes], blocks: list[int]) -> None:
        """Offer blocks to every store; each copy holds them until it is done."""
        for store in self._stores:
            copy = self._attempt(partial(store.save, keys, blocks), None)
            if copy is not None:
                self._pool.share(blocks)
                self.copies.append((copy, blocks))

    def abandon(self, loading: Pending[int], blocks: list[int]) -> None:
        """Keep a load's blocks, whose owner is gone, until it no longer writes to them."""
        self.copies.append((loading, blocks))

    def poll(self) -> bool:
        """Let go of the blocks of finished copies; whether there was one."""
        if not self.copies:
            return False
        unfinished: list[tuple[Pending[int], list[int]]] = []
        for copy, blocks in self.copies:
            kept = self.arrived(copy)
            if kept is None:
                unfinished.append((copy, blocks))
            else:
                self.num_saved += kept
                self._pool.drop(blocks)
        progressed = len(unfinished) < len(self.copies)
        self.copies = unfinished
        return progressed

    def _attempt(self, call: Callable[[], Result], otherwise: Result) -> Result:
        try:
            return call()
        except Exception:
            self.num_faults += 1
            logger.exception("a block store failed; treated as a miss")
            return otherwise
