"""A second place where KV blocks may be: host memory, disk, or a peer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_traits.pending import Pending


class BlockStore(Protocol):
    """KV blocks kept off the device, addressed by what they contain.

    A block under `load` or `save` is referenced by the engine until the result is done. Losing a
    block is a shorter hit, never an error.
    """

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are held."""
        ...

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Pending[int]:
        """Copy stored blocks into the device; the result counts the leading blocks that arrived."""
        ...

    def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Pending[int]:
        """Copy device blocks into the store; the result counts the leading blocks kept."""
        ...
