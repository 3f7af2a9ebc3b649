"""Block tables over a pool: attach a known prefix, grow, publish, give back.

Knows positions and contents, not requests or steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_traits import BackendInfo, BlockStore

from vllm_core.kv_cache.keys import Digest, KeyChain, Root, sha256
from vllm_core.kv_cache.pool import BlockPool
from vllm_core.kv_cache.sessions import SessionKey, Sessions
from vllm_core.kv_cache.table import NEVER, BlockTable
from vllm_core.kv_cache.tiers import Tiers


class KVCache:
    """All blocks of a backend and everybody who holds them.

    Args:
        info: Number, size and fingerprint of the blocks.
        stores: Other places where blocks may be, nearest first.
        enabled: Whether prefixes are reused at all.
        max_session_share: Largest share of the blocks that sessions may pin.
        session_ttl_s: Seconds that a pin outlives its last use.
        digest: Replaced by a weak one in tests only; outputs must not depend on it.
    """

    def __init__(
        self,
        info: BackendInfo,
        stores: Sequence[BlockStore] = (),
        *,
        enabled: bool = True,
        max_session_share: float = 0.5,
        session_ttl_s: float = 1800.0,
        digest: Digest = sha256,
    ) -> None:
        self.block_size = info.block_size
        self.pool = BlockPool(info.num_blocks)
        self.enabled = enabled and info.prefix_cacheable
        self.tiers = Tiers(self.pool, stores if self.enabled else ())
        max_pinned = int(info.num_blocks * max_session_share)
        self.sessions = Sessions(self.pool, max_pinned, session_ttl_s)
        self._fingerprint = info.fingerprint
        self._digest = digest

    def table(self, salt: bytes, adapter: str | None, reuses: bool) -> BlockTable:
        """An empty table; with `reuses` false every position will be computed."""
        root = Root(self._fingerprint, salt, adapter)
        chain = KeyChain(root, self.block_size, self._digest)
        first = self.block_size if self.enabled else NEVER
        return BlockTable(chain, reuses and self.enabled, self.enabled, root, first)

    def num_missing(self, table: BlockTable, num_positions: int) -> int:
        """Blocks a table lacks to hold so many positions."""
        return max(0, -(-num_positions // self.block_size) - len(table.blocks))

    def attach(self, table: BlockTable, token_ids: Sequence[int], keep_free: int) -> int | None:
        """Fill an empty table with blocks that already contain the sequence's prefix.

        At least one position stays to be computed, or there would be nothing to sample from.

        Args:
            table: The sequence's table.
            token_ids: All confirmed tokens.
            keep_free: Blocks that loading from a store must leave available.

        Returns:
            Positions whose KV is there; None while some are still being loaded.
        """
        if not table.attached:
            table.attached = True
            if table.reuses:
                self._match(table, token_ids, keep_free)
        if table.loading is not None:
            return None
        return table.num_published * self.block_size

    def _match(self, table: BlockTable, token_ids: Sequence[int], keep_free: int) -> None:
        num_blocks = (len(token_ids) - 1) // self.block_size
        table.chain.extend(token_ids, num_blocks)
        blocks, table.parent = self.pool.match(table.chain, num_blocks)
        self.pool.share(blocks)
        table.blocks = blocks
        table.num_hit = len(blocks)
        self._set_published(table, len(blocks))
        table.capacity = len(blocks) * self.block_size
        missing = table.chain.keys[len(blocks) : num_blocks]
        if missing and self.tiers:
            self._begin_loading(table, missing, keep_free)

    def _begin_loading(self, table: BlockTable, keys: list[bytes], keep_free: int) -> None:
        found = self.tiers.find(keys)
        if found is None:
            return
        store, held = found
        if self.pool.num_available - held < keep_free:
            return
        blocks = self.pool.take(held)
        if blocks is None:
            return
        table.loading = self.tiers.load(store, keys[:held], blocks)
        if table.loading is None:
            self.pool.drop(blocks)
        else:
            self._append(table, blocks)

    def poll_load(self, table: BlockTable) -> None:
        """Notice that a store is done loading; what arrived counts as computed."""
        if table.loading is None:
            return
        arrived = self.tiers.arrived(table.loading)
        if arrived is None:
            return
        table.loading = None
        table.num_loaded = arrived
        self.tiers.num_loaded += arrived
        self._publish_until(table, table.num_published + arrived)

    def grow(self, table: BlockTable, num_positions: int) -> tuple[int, ...] | None:
        """Extend a table to hold so many positions.

        Returns:
            The new blocks, or None, and nothing changed, if there are too few. Sessions let go of
            theirs first.
        """
        missing = self.num_missing(table, num_positions)
        if not missing:
            return ()
        if not self.make_available(missing):
            return None
        blocks = self.pool.take(missing)
        assert blocks is not None, "available blocks could not be taken"
        self._append(table, blocks)
        return tuple(blocks)

    def make_available(self, num_blocks: int) -> bool:
        """Drop as many sessions as it takes to have so many blocks to hand out."""
        if self.pool.num_available + self.sessions.num_pinned < num_blocks:
            return False  # it would not help
        while self.pool.num_available < num_blocks:
            if not self.sessions.drop_oldest():
                return False
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], num_valid: int) -> None:
        """Offer full blocks among the first `num_valid` positions, whose tokens are confirmed."""
        full = num_valid // self.block_size
        if full <= table.num_published or not table.publishes:
            return
        table.chain.extend(token_ids, full)
        first = table.num_published
        self._publish_until(table, full)
        if self.tiers:
            keys, blocks = table.chain.keys[first:full], table.blocks[first:full]
            self.tiers.save(keys, blocks)

    def _publish_until(self, table: BlockTable, full: int) -> None:
        chain = table.chain
        for index in range(table.num_published, full):
            table.parent = self.pool.publish(
                table.blocks[index], chain.keys[index], chain.contents[index], table.parent
            )
        self._set_published(table, full)

    def release(self, table: BlockTable) -> None:
        """Give every block back; the table is as new, and what it published can be found."""
        blocks = table.blocks
        if table.loading is not None:
            kept = table.num_published
            self.tiers.abandon(table.loading, blocks[kept:])
            table.loading = None
            blocks = blocks[:kept]
        self.pool.drop(blocks)
        table.blocks = []
        table.capacity = 0
        table.attached = False
        table.num_loaded = 0
        table.parent = table.chain.root
        self._set_published(table, 0)

    def pin(self, session: SessionKey, table: BlockTable, now: float) -> None:
        """Hold what a finished sequence published for the next request of its session."""
        self.sessions.pin(session, table.chain, now)

    def poll(self, now: float) -> bool:
        """Notice finished copies and expired sessions; whether a copy finished."""
        if self.sessions.pins:
            self.sessions.expire(now)
        return self.tiers.poll()

    def forget(self) -> None:
        """Forget the contents of all blocks, as after a fault that may have damaged them."""
        self.sessions.clear()
        self.pool.unpublish_all()

    def _append(self, table: BlockTable, blocks: list[int]) -> None:
        table.blocks += blocks
        table.capacity = len(table.blocks) * self.block_size

    def _set_published(self, table: BlockTable, num_blocks: int) -> None:
        table.num_published = num_blocks
        if table.publishes:
            table.publish_at = (num_blocks + 1) * self.block_size
