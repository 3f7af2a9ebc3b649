"""Store the keys and values of a step at their places in the KV pool.

key, value [T, K, D]; keys, values [B, P, K, D]; slot_mapping [T] is block * P + offset.
"""

from __future__ import annotations

from torch import Tensor


def kv_write(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """Write every token's key and value in place."""
    keys.flatten(0, 1).index_copy_(0, slot_mapping, key)
    values.flatten(0, 1).index_copy_(0, slot_mapping, value)


def reference(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """The textbook form, token by token."""
    size = keys.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        keys[slot // size, slot % size] = key[token]
        values[slot // size, slot % size] = value[token]
