from __future__ import annotations

import pytest
from vllm_core.kv_cache.keys import KeyChain, Root
from vllm_core.kv_cache.pool import BlockPool

ROOT = Root(b"model", b"", None)


def chain_of(tokens: list[int], root: Root = ROOT, digest: object = None) -> KeyChain:
    chain = KeyChain(root, 2) if digest is None else KeyChain(root, 2, digest)  # type: ignore[arg-type]
    chain.extend(tokens, len(tokens) // 2)
    return chain


def publish(pool: BlockPool, blocks: list[int], chain: KeyChain) -> None:
    parent: int | Root = chain.root
    for block, key, content in zip(blocks, chain.keys, chain.contents, strict=False):
        parent = pool.publish(block, key, content, parent)


def taken(pool: BlockPool, number: int) -> list[int]:
    blocks = pool.take(number)
    assert blocks is not None
    return blocks


def test_take_hands_out_distinct_blocks_and_refuses_more_than_there_are() -> None:
    pool = BlockPool(3)
    assert len(set(taken(pool, 2))) == 2
    assert pool.take(2) is None
    assert pool.num_available == 1, "a refusal takes nothing"


def test_dropped_blocks_can_be_taken_again() -> None:
    pool = BlockPool(2)
    pool.drop(taken(pool, 2))
    assert sorted(taken(pool, 2)) == [0, 1]


def test_dropping_more_often_than_sharing_is_noticed() -> None:
    pool = BlockPool(1)
    blocks = taken(pool, 1)
    pool.drop(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.drop(blocks)


def test_published_blocks_are_found_after_their_owner_is_gone() -> None:
    pool = BlockPool(4)
    chain = chain_of([1, 2, 3, 4])
    blocks = taken(pool, 2)
    publish(pool, blocks, chain)
    pool.drop(blocks)
    assert pool.match(chain_of([1, 2, 3, 4, 5, 6]), 3)[0] == blocks


def test_empty_blocks_are_used_before_cached_ones_are_evicted() -> None:
    pool = BlockPool(3)
    blocks = taken(pool, 1)
    publish(pool, blocks, chain_of([1, 2]))
    pool.drop(blocks)
    taken(pool, 2)
    assert pool.match(chain_of([1, 2]), 1)[0] == blocks
    taken(pool, 1)
    assert pool.match(chain_of([1, 2]), 1)[0] == []


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    pool = BlockPool(3)
    blocks = taken(pool, 3)
    chain = chain_of([1, 2, 3, 4, 5, 6])
    publish(pool, blocks, chain)
    pool.drop(blocks)
    taken(pool, 1)
    assert pool.match(chain, 3)[0] == blocks[:2]


def test_the_longest_unused_prefix_is_evicted_first() -> None:
    pool = BlockPool(2)
    first, second = taken(pool, 1), taken(pool, 1)
    publish(pool, first, chain_of([1, 2]))
    publish(pool, second, chain_of([3, 4]))
    pool.drop(first)
    pool.drop(second)
    pool.share(first)
    pool.drop(first)  # used again
    taken(pool, 1)
    assert pool.match(chain_of([1, 2]), 1)[0] == first
    assert pool.match(chain_of([3, 4]), 1)[0] == []


def test_a_shared_block_is_not_available_until_its_last_owner_drops_it() -> None:
    pool = BlockPool(1)
    blocks = taken(pool, 1)
    pool.share(blocks)
    pool.drop(blocks)
    assert pool.take(1) is None
    pool.drop(blocks)
    assert pool.take(1) == blocks


def test_equal_content_published_twice_is_one_entry() -> None:
    pool = BlockPool(4)
    first, second = taken(pool, 2), taken(pool, 2)
    chain = chain_of([1, 2, 3, 4])
    publish(pool, first, chain)
    publish(pool, second, chain)
    assert pool.match(chain, 2)[0] == first
    pool.drop(second)
    assert sorted(pool.empty) == sorted(second), "a copy nobody can find is empty"


def test_with_a_digest_of_no_use_contents_still_decide() -> None:
    pool = BlockPool(4)
    blocks = taken(pool, 2)
    publish(pool, blocks, chain_of([1, 2, 3, 4], digest=lambda data: b"x"))
    other = chain_of([9, 9, 3, 4], digest=lambda data: b"x")
    assert pool.match(other, 2)[0] == []


def test_an_equal_block_behind_another_parent_is_no_hit() -> None:
    def by_content(data: bytes) -> bytes:
        return data[-8:]

    pool = BlockPool(4)
    one, two = taken(pool, 2), taken(pool, 2)
    publish(pool, one, chain_of([1, 2, 7, 7], digest=by_content))
    publish(pool, two, chain_of([3, 4, 7, 7], digest=by_content))
    assert pool.match(chain_of([1, 2, 7, 7], digest=by_content), 2)[0] == one[:1]
    assert pool.match(chain_of([3, 4, 7, 7], digest=by_content), 2)[0] == two


def test_tenants_do_not_share_even_if_every_key_collides() -> None:
    pool = BlockPool(2)
    mine = Root(b"model", b"me", None)
    blocks = taken(pool, 1)
    publish(pool, blocks, chain_of([1, 2], mine, lambda data: b"x"))
    assert pool.match(chain_of([1, 2], mine, lambda data: b"x"), 1)[0] == blocks
    yours = Root(b"model", b"you", None)
    assert pool.match(chain_of([1, 2], yours, lambda data: b"x"), 1)[0] == []


def test_a_forgotten_parent_hides_its_children_until_it_is_published_again() -> None:
    pool = BlockPool(4)
    blocks = taken(pool, 2)
    chain = chain_of([1, 2, 3, 4])
    publish(pool, blocks, chain)
    pool.unpublish(blocks[0])
    assert pool.match(chain, 2)[0] == []
    fresh = taken(pool, 2)
    publish(pool, fresh, chain)
    assert pool.match(chain, 2)[0] == fresh, "the stale child makes way"


def test_unpublish_all_leaves_held_blocks_held_and_others_empty() -> None:
    pool = BlockPool(2)
    held, free = taken(pool, 1), taken(pool, 1)
    publish(pool, held, chain_of([1, 2]))
    publish(pool, free, chain_of([3, 4]))
    pool.drop(free)
    pool.unpublish_all()
    assert pool.empty == free and not pool.cached and not pool.block_of
    assert pool.refs[held[0]] == 1
