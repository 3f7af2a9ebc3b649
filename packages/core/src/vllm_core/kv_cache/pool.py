"""The blocks of a backend: who holds them, and what the unheld ones still contain.

Knows block numbers and contents, not sequences. Everything is O(1) per block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from vllm_core.kv_cache.keys import KeyChain, Root

Parent = int | Root  # serial of the entry before, or what the first entry hangs on


class Entry(NamedTuple):
    """What a published block contains, in full, so that a key can be wrong without harm.

    Attributes:
        key: Where the entry is indexed.
        content: Packed token ids.
        parent: Serial of the entry before it, or the root.
        serial: Never used again, even for the same content.
    """

    key: bytes
    content: bytes
    parent: Parent
    serial: int


class BlockPool:
    """Reference-counted blocks; published ones stay findable until they are reused.

    Blocks are reused in this order: those that contain nothing, then the longest unreferenced.
    `drop` lets go of a table from its end, so the tail of a prefix goes before its head.
    """

    def __init__(self, num_blocks: int) -> None:
        self.refs = [0] * num_blocks
        self.entries: list[Entry | None] = [None] * num_blocks
        self.empty = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()  # unreferenced entries, oldest first
        self.block_of: dict[bytes, int] = {}
        self._next_serial = 1

    @property
    def num_available(self) -> int:
        """Blocks that `take` could hand out."""
        return len(self.empty) + len(self.cached)

    def take(self, num_blocks: int) -> list[int] | None:
        """Hand out blocks with one reference each; None if there are too few."""
        if len(self.empty) + len(self.cached) < num_blocks:
            return None
        taken: list[int] = []
        for _ in range(num_blocks):
            if self.empty:
                block = self.empty.pop()
            else:
                block, _ = self.cached.popitem(last=False)
                self._forget(block)
            self.refs[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each block; one that was only cached is held again."""
        refs = self.refs
        for block in blocks:
            if refs[block] == 0:
                del self.cached[block]
            refs[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Remove an owner from each block, last block first."""
        refs = self.refs
        for block in reversed(blocks):
            refs[block] -= 1
            if refs[block] == 0:
                self._let_go(block)
            assert refs[block] >= 0, f"block {block} was dropped more often than it was shared"

    def publish(self, block: int, key: bytes, content: bytes, parent: Parent) -> int:
        """Make a held, full block findable.

        A block with the same content that was there first stays; an entry under the same key with
        another content, or behind a forgotten parent, makes way.

        Returns:
            Serial of the entry that now stands for the content.
        """
        present = self.block_of.get(key)
        if present is not None:
            entry = self.entries[present]
            assert entry is not None, f"key of block {present} without an entry"
            if entry.parent == parent and entry.content == content:
                return entry.serial
            self.unpublish(present)
        serial = self._next_serial
        self._next_serial += 1
        self.entries[block] = Entry(key, content, parent, serial)
        self.block_of[key] = block
        return serial

    def unpublish(self, block: int) -> None:
        """Forget what a block contains; if nobody holds it, it is empty."""
        self._forget(block)
        if self.refs[block] == 0:
            del self.cached[block]
            self.empty.append(block)

    def unpublish_all(self) -> None:
        """Forget what every block contains."""
        for block in list(self.block_of.values()):
            self.unpublish(block)

    def match(self, chain: KeyChain, num_blocks: int) -> tuple[list[int], Parent]:
        """The longest leading run of a chain's first blocks that is present.

        Returns:
            The blocks, not yet shared, and the parent of whatever follows them.
        """
        found: list[int] = []
        parent: Parent = chain.root
        block_of, entries = self.block_of, self.entries
        for key, content in zip(chain.keys[:num_blocks], chain.contents, strict=False):
            block = block_of.get(key)
            if block is None:
                break
            entry = entries[block]
            assert entry is not None, f"key of block {block} without an entry"
            if entry.content != content or entry.parent != parent:
                break
            found.append(block)
            parent = entry.serial
        return found, parent

    def _let_go(self, block: int) -> None:
        if self.entries[block] is None:
            self.empty.append(block)
        else:
            self.cached[block] = None

    def _forget(self, block: int) -> None:
        entry = self.entries[block]
        if entry is not None:
            del self.block_of[entry.key]
            self.entries[block] = None
