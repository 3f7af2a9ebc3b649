"""What a block contains, as a chained key.

A key names a block together with everything before it: digest(key of the block before, its token
ids). It is only an index: whoever follows it compares contents as well.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

Digest = Callable[[bytes], bytes]


class Root(NamedTuple):
    """What must be equal before two sequences may share any block.

    Attributes:
        fingerprint: Model, weights and KV layout.
        salt: The tenant.
        adapter: LoRA adapter, or None.
    """

    fingerprint: bytes
    salt: bytes
    adapter: str | None


def sha256(data: bytes) -> bytes:
    """The digest of every key."""
    return hashlib.sha256(data).digest()


def root_key(root: Root, digest: Digest = sha256) -> bytes:
    """Key that the first block's key is chained to; fields cannot run into each other."""
    adapter = b"" if root.adapter is None else b"+" + root.adapter.encode("utf-8", "surrogatepass")
    fields = (root.fingerprint, root.salt, adapter)
    return digest(b"".join(len(field).to_bytes(8, "little") + field for field in fields))


class KeyChain:
    """Keys and contents of a sequence's leading full blocks, computed as they are asked for.

    Attributes:
        root: What the first block hangs on.
        keys: One per block.
        contents: Token ids of each block as packed 32-bit integers, compared on every hit.
    """

    __slots__ = ("_block_size", "_digest", "_tip", "contents", "keys", "root")

    def __init__(self, root: Root, block_size: int, digest: Digest = sha256) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self.contents: list[bytes] = []
        self._block_size = block_size
        self._digest = digest
        self._tip: bytes | None = None

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> None:
        """Make at least the first `num_blocks` blocks of `token_ids` available."""
        first = len(self.keys)
        if num_blocks <= first:
            return
        size = self._block_size
        packed = array("i", token_ids[first * size : num_blocks * size]).tobytes()
        width = len(packed) // (num_blocks - first)
        digest, keys, contents = self._digest, self.keys, self.contents
        key = root_key(self.root, digest) if self._tip is None else self._tip
        for offset in range(0, len(packed), width):
            content = packed[offset : offset + width]
            key = digest(key + content)
            keys.append(key)
            contents.append(content)
        self._tip = key
