"""Store the keys and values of a step at their places in the KV pool.

key [T, K, D]; value [T, K, W] or None where values are read from the keys; keys [B, P, K, D] and
values [B, P, K, W] as `KVSide` tells; slot_mapping [T] is block * P + offset.
"""

from __future__ import annotations

from torch import Tensor

from vllm_models.gpu.launch import kernels_for
from vllm_models.kernels.kv_side import KVSide, quantize
from vllm_models.native.attention import write_kv
from vllm_models.native.library import loaded


def kv_write(
    key: Tensor, value: Tensor | None, keys: KVSide, values: KVSide, slot_mapping: Tensor
) -> None:
    """Write every token's key and value in place."""
    if (gpu := kernels_for(key)) is not None:
        gpu.kv_write(key, value, *keys, *values, slot_mapping)
        return
    if keys.data.dim() > 4:  # in the order of the CPU's kernels
        write_kv(loaded(), key, value, keys, values, slot_mapping)
        return
    keys.put(slot_mapping, key)
    if value is not None:
        values.put(slot_mapping, value)


def reference(
    key: Tensor, value: Tensor | None, keys: KVSide, values: KVSide, slot_mapping: Tensor
) -> None:
    """The textbook form, token by token."""
    size = keys.data.shape[1]
    for side, heads in ((keys, key), (values, value)):
        for token, slot in enumerate(slot_mapping.tolist()):
            if heads is None:
                continue
            block, offset = divmod(slot, size)
            if side.scales is None:
                side.data[block, offset] = heads[token]
            else:
                stored, scales = quantize(heads[token], side.data.dtype)
                side.data[block, offset], side.scales[block, offset] = stored, scales
