from __future__ import annotations

import hashlib

from vllm_core.kv_cache.keys import KeyChain, Root, root_key

ROOT = Root(b"model", b"salt", None)


def keys_of(tokens: list[int], root: Root = ROOT, block_size: int = 4) -> list[bytes]:
    chain = KeyChain(root, block_size)
    chain.extend(tokens, len(tokens) // block_size)
    return chain.keys


def test_a_key_is_the_digest_of_the_key_before_and_the_packed_tokens() -> None:
    packed = b"".join(token.to_bytes(4, "little") for token in (1, 2, 3, 4))
    assert keys_of([1, 2, 3, 4]) == [hashlib.sha256(root_key(ROOT) + packed).digest()]


def test_equal_prefixes_have_equal_keys_and_everything_behind_a_difference_differs() -> None:
    one, two = keys_of([1, 2, 3, 4, 5, 6, 7, 8]), keys_of([9, 2, 3, 4, 5, 6, 7, 8])
    assert keys_of([1, 2, 3, 4, 9, 9, 9, 9])[0] == one[0]
    assert one[0] != two[0] and one[1] != two[1]


def test_fingerprint_salt_and_adapter_are_told_apart() -> None:
    roots = [
        Root(b"ab", b"", None),
        Root(b"a", b"b", None),
        Root(b"", b"ab", None),
        Root(b"ab", b"", ""),
        Root(b"a", b"", "b"),
    ]
    assert len({root_key(root) for root in roots}) == len(roots)


def test_only_full_blocks_have_keys() -> None:
    chain = KeyChain(ROOT, 4)
    chain.extend([1, 2, 3, 4, 5], 1)
    assert len(chain.keys) == len(chain.contents) == 1


def test_extending_step_by_step_equals_extending_at_once() -> None:
    tokens = list(range(100, 140))
    chain = KeyChain(ROOT, 4)
    for num_blocks in (1, 1, 4, 3, 10):
        chain.extend(tokens, num_blocks)
    assert chain.keys == keys_of(tokens)
