"""What a forward pass is told about the step besides its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from vllm_models.gpu.spans import GpuSpans
from vllm_models.kernels.kv_side import KVSide
from vllm_models.kernels.paged_attention import Prepared
from vllm_models.native.attention import Spans


class LayerKV(NamedTuple):
    """What a layer keeps of every position, and how far back it looks.

    Attributes:
        window: Positions a query looks back, its own included; 0 is all.
        num_kv_heads: Key and value heads.
        key_dim: Width of a key head.
        value_dim: Width of a value head; 0 if values are read from the keys.
        shared_with: An earlier layer whose keys and values it reads instead of its own.
    """

    window: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    shared_with: int | None = None


class ForwardContext(NamedTuple):
    """One step, ragged over its sequences.

    Attributes:
        positions: [T] of every token in its own sequence.
        slot_mapping: [T] where its key and value are written.
        attention: Who attends to what, of every layer.
        kv: Keys and values of every layer; the same twice if it keeps no values.
    """

    positions: Tensor
    slot_mapping: Tensor
    attention: Sequence[Prepared | Spans | GpuSpans]
    kv: Sequence[tuple[KVSide, KVSide]]
