"""Store the keys and values of a step at their places in the KV pool.

key [T, K, D]; value [T, K, W] or None where values are read from the keys; keys [B, P, K, D];
values [B, P, K, W]; slot_mapping [T] is block * P + offset. Keys and values of another shape are in
the order of the CPU's kernels, see `vllm_models.native.attention`.
"""

from __future__ import annotations

from torch import Tensor

from vllm_models.native.attention import write_kv
from vllm_models.native.library import loaded


def kv_write(
    key: Tensor, value: Tensor | None, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """Write every token's key and value in place."""
    if keys.dim() > 4:  # in the order of the CPU's kernels
        write_kv(loaded(), key, value, keys, values, slot_mapping)
        return
    keys.flatten(0, 1).index_copy_(0, slot_mapping, key)
    if value is not None:
        values.flatten(0, 1).index_copy_(0, slot_mapping, value)


def reference(
    key: Tensor, value: Tensor | None, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """The textbook form, token by token."""
    size = keys.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        keys[slot // size, slot % size] = key[token]
        if value is not None:
            values[slot // size, slot % size] = value[token]
