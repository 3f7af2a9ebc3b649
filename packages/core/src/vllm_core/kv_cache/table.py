"""The blocks of one sequence, in order of position, and what is known of their contents."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_traits import Pending

from vllm_core.kv_cache.keys import KeyChain
from vllm_core.kv_cache.pool import Parent

NEVER = 1 << 62  # a number of positions that no sequence reaches


@dataclass(slots=True, eq=False)
class BlockTable:
    """One sequence's view of the cache; changed by `KVCache` alone.

    Attributes:
        chain: Keys of the sequence's full blocks.
        reuses: Whether blocks of others may stand for computing.
        publishes: Whether its blocks may stand for others' computing.
        blocks: Held blocks in order of position.
        capacity: Positions that fit into them.
        num_published: Leading blocks that the cache knows, or was offered.
        publish_at: Computed positions at which the next block is worth offering.
        parent: What the next published block hangs on.
        attached: Whether the cache was asked for a prefix since the table was last empty.
        loading: A copy from a store into the blocks behind the published ones.
        num_hit: Blocks found in the pool when attached.
        num_loaded: Blocks that a store brought.
    """

    chain: KeyChain
    reuses: bool
    publishes: bool
    parent: Parent
    publish_at: int
    blocks: list[int] = field(default_factory=list[int])
    capacity: int = 0
    num_published: int = 0
    attached: bool = False
    loading: Pending[int] | None = None
    num_hit: int = 0
    num_loaded: int = 0
