"""What a forward pass is told about the step besides its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vllm_models.kernels.paged_attention import Prepared


class ForwardContext(NamedTuple):
    """One step, ragged over its sequences.

    Attributes:
        positions: [T] of every token in its own sequence.
        slot_mapping: [T] where its key and value are written.
        attention: Who attends to what.
        kv: Keys and values [B, P, K, D] of every layer.
    """

    positions: Tensor
    slot_mapping: Tensor
    attention: Prepared
    kv: Sequence[tuple[Tensor, Tensor]]
