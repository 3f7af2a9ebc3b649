"""A tensor of a checkpoint, wherever it is saved: name, shape, type, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

PLAIN_KINDS = frozenset({"F64", "F32", "F16", "BF16"})


class SavedTensor(NamedTuple):
    """One tensor under its Hugging Face name; nothing is read until `read` is called.

    Attributes:
        name: As in a Hugging Face checkpoint.
        shape: Logical shape, outermost first.
        kind: Type as safetensors names it ("BF16", "I32"), or a ggml block type ("Q4_K").
        source: The file, for messages.
        num_bytes: Size in the file.
        read: Gives a tensor of `shape`, or the blocks uint8 [rows, bytes per row] of a block type;
            a view of the file, valid until `release`.
        release: Says that the bytes are not needed again.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    source: str
    num_bytes: int
    read: Callable[[], Tensor]
    release: Callable[[], None]

    def part(
        self, name: str, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]
    ) -> SavedTensor:
        """A tensor that is made of this one, such as one expert of a stack."""
        return self._replace(name=name, shape=shape, read=lambda: take(self.read()))
