"""What must hold between any two steps of a scheduler, checked from outside of it.

Meant for tests: it walks everything, so its cost grows with the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vllm_core.kv_cache.pool import BlockPool
from vllm_core.scheduler.scheduler import Scheduler
from vllm_core.scheduler.sequence import Sequence


def violations(scheduler: Scheduler) -> list[str]:
    """Every invariant that does not hold, in words; empty when all is well."""
    owners = owners_of_blocks(scheduler)
    found = [*_pool(scheduler.cache.pool, owners), *_index(scheduler.cache.pool)]
    for seq in scheduler.roster.sequences.values():
        found += _sequence(scheduler, seq)
    found += _states(scheduler)
    return found


def owners_of_blocks(scheduler: Scheduler) -> Counter[int]:
    """How many tables, copies and sessions hold each block."""
    owners: Counter[int] = Counter()
    for seq in scheduler.roster.sequences.values():
        owners.update(seq.table.blocks)
    for _, blocks in scheduler.cache.tiers.copies:
        owners.update(blocks)
    for pin in scheduler.cache.sessions.pins.values():
        owners.update(pin.blocks)
    return owners


def _pool(pool: BlockPool, owners: Counter[int]) -> Iterator[str]:
    num_used = sum(refs > 0 for refs in pool.refs)
    if num_used + len(pool.empty) + len(pool.cached) != len(pool.refs):
        yield "used, empty and cached blocks do not add up to the pool"
    if len(set(pool.empty)) != len(pool.empty):
        yield "a block is in the free list twice"
    for block, refs in enumerate(pool.refs):
        if refs != owners[block]:
            yield f"block {block} has {refs} references and {owners[block]} owners"
    for block in (*pool.empty, *pool.cached):
        if pool.refs[block]:
            yield f"block {block} is free and held"
    for block in pool.empty:
        if pool.entries[block] is not None:
            yield f"block {block} is empty and published"


def _index(pool: BlockPool) -> Iterator[str]:
    for key, block in pool.block_of.items():
        entry = pool.entries[block]
        if entry is None or entry.key != key:
            yield f"a key points to block {block}, which does not have it"
    indexed = set(pool.block_of.values())
    for block, entry in enumerate(pool.entries):
        if entry is not None and block not in indexed:
            yield f"block {block} is published but cannot be found"
    for block in pool.cached:
        if pool.entries[block] is None:
            yield f"block {block} is cached but has no content"
    serials = [entry.serial for entry in pool.entries if entry is not None]
    if len(set(serials)) != len(serials):
        yield "two entries have one serial"


def _sequence(scheduler: Scheduler, seq: Sequence) -> Iterator[str]:
    name, table, pool = f"sequence {seq.id}", seq.table, scheduler.cache.pool
    root = table.chain.root
    if (root.salt, root.adapter) != (seq.request.salt, seq.request.adapter):
        yield f"{name} looks for blocks of another tenant or adapter"
    if table.capacity != len(table.blocks) * scheduler.info.block_size:
        yield f"{name} has {len(table.blocks)} blocks for {table.capacity} positions"
    if seq.computed > table.capacity:
        yield f"{name} computed {seq.computed} of {table.capacity} positions"
    if seq.pending < 0 or seq.in_flight < 0:
        yield f"{name} has {seq.pending} tokens pending and {seq.in_flight} batches in flight"
    if len(set(table.blocks)) != len(table.blocks):
        yield f"{name} holds a block twice"
    if table.num_published * scheduler.info.block_size > len(seq.tokens):
        yield f"{name} published more than its confirmed tokens"
    yield from _contents(pool, seq)


def _contents(pool: BlockPool, seq: Sequence) -> Iterator[str]:
    """What the index says of a sequence's blocks is what the sequence has there."""
    name, table = f"sequence {seq.id}", seq.table
    for index in range(table.num_published):
        entry = pool.entries[table.blocks[index]]
        if entry is None:
            continue
        if entry.content != table.chain.contents[index]:
            yield f"{name} holds block {table.blocks[index]} with the content of another"
        if index == 0 and entry.parent != table.chain.root:
            yield f"{name} holds a block of another root"


def _states(scheduler: Scheduler) -> Iterator[str]:
    roster = scheduler.roster
    waiting, running = {seq.id for seq in roster.waiting}, set(roster.running)
    leaving = {seq.id for seq in roster.sequences.values() if seq.finished}
    if waiting & running or waiting & leaving or running & leaving:
        yield "a sequence is in two states"
    if waiting | running | leaving != set(roster.sequences):
        yield "a sequence is in no state"
    if roster.num_unfinished != len(waiting) + len(running):
        yield f"{roster.num_unfinished} requests are unfinished, but not so many wait or run"
    if roster.num_rows != sum(seq.started for seq in roster.sequences.values()):
        yield f"{roster.num_rows} rows are counted, but not so many sequences started"
    in_flight = Counter(seq.id for each in scheduler.in_flight for seq in each.sequences)
    for seq in roster.sequences.values():
        if seq.in_flight != in_flight[seq.id]:
            yield f"sequence {seq.id} is in flight {in_flight[seq.id]} times, not {seq.in_flight}"
        if seq.num_preemptions > scheduler.config.max_preemptions:
            yield f"sequence {seq.id} was preempted {seq.num_preemptions} times"
    stats = scheduler.stats
    if stats.received != sum(stats.finished.values()) + roster.num_unfinished:
        yield "requests received are not those finished plus those in flight"
