"""Store the keys and values of a step in their blocks, as they are or in eight bits.

key [T, K, D], value [T, K, W]; keys [B, K, P, D], values [B, K, P, W]; slots [T] is
block * P + offset. Eight bits are int8 or float8_e4m3fn beside scales [B, K, P] in float32:

    scale = max |x| of a position and head / (127 or 448),   stored = x / scale
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024  # numbers per program
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _scales_of(largest, pointers, there, LIMIT: tl.constexpr):
    """Store the scales of some heads [N] whose largest numbers are given; returns their inverses.

    Numbers so small that the inverse would be no number become zeros.
    """
    scale = largest / LIMIT
    tl.store(pointers, scale, mask=there)
    return tl.where(scale > 1e-36, 1.0 / tl.where(scale > 1e-36, scale, 1.0), 0.0)


@triton.jit
def _in_eight_bits(numbers, inverse, ELEMENT: tl.constexpr):
    """float32 [N, tile] over scales [N] as the pool's type."""
    scaled = numbers * inverse[:, None]
    if ELEMENT.is_int():
        scaled = (scaled + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
    return scaled.to(ELEMENT)


@triton.jit
def store_heads(
    numbers, there, data, scales, row, WIDTH: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr
):
    """Put heads [N, TILE] into rows [N] of a side of the KV, seen as [B * K * P, WIDTH]."""
    columns = tl.arange(0, TILE)
    mask = there[:, None] & (columns < WIDTH)[None, :]
    pointers = data + row[:, None] * WIDTH + columns[None, :]
    if scales is None:
        tl.store(pointers, numbers, mask=mask)
    else:
        wide = numbers.to(tl.float32)
        inverse = _scales_of(tl.max(tl.abs(wide), axis=1), scales + row, there, LIMIT)
        tl.store(pointers, _in_eight_bits(wide, inverse, data.dtype.element_ty), mask=mask)


@triton.jit
def write_heads(
    heads, there, data, scales, row, WIDTH: tl.constexpr, LIMIT: tl.constexpr, TILE: tl.constexpr
):
    """The same with heads that lie where `heads` [N] points."""
    columns = tl.arange(0, TILE)
    mask = there[:, None] & (columns < WIDTH)[None, :]
    numbers = tl.load(heads[:, None] + columns[None, :], mask=mask, other=0.0)
    store_heads(numbers, there, data, scales, row, WIDTH, LIMIT, TILE)


@triton.jit
def _write_kernel(
    key,
    value,
    keys,
    key_scales,
    values,
    value_scales,
    slots,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = heads < NUM_HEADS
    slot = tl.load(slots + token).to(tl.int64)
    row = (slot // BLOCK_SIZE * NUM_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    source = key + token * key_stride + heads * DIM
    write_heads(source, there, keys, key_scales, row, DIM, LIMIT, TILE)
    if value is not None:
        source = value + token * value_stride + heads * VALUE_DIM
        write_heads(source, there, values, value_scales, row, VALUE_DIM, LIMIT, VALUE_TILE)


def kv_write(
    key: Tensor,
    value: Tensor | None,
    keys: Tensor,
    key_scales: Tensor | None,
    values: Tensor | None,
    value_scales: Tensor | None,
    slots: Tensor,
) -> None:
    """Write every token's key and value in place.

    Args:
        key: [T, K, D]; tokens may be apart.
        value: [T, K, W], or None where values are read from the keys.
        keys: [B, K, P, D] of any type; with scales if it has eight bits.
        key_scales: float32 [B, K, P].
        values: [B, K, P, W]; not read without `value`.
        value_scales: float32 [B, K, P].
        slots: [T] integers.
    """
    key = heads_together(key)
    value = None if value is None else heads_together(value)
    num_tokens, num_heads, dim = key.shape
    value_dim = dim if value is None else value.shape[2]
    tile = triton.next_power_of_2(max(dim, value_dim))
    heads = heads_per_program(num_heads, tile)
    _write_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        *(key, value, keys, key_scales, None if value is None else values),
        *(None if value is None else value_scales, slots),
        *(key.stride(0), 0 if value is None else value.stride(0)),
        NUM_HEADS=num_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_SIZE=keys.shape[2],
        LIMIT=LIMITS.get(keys.dtype, 1.0),
        HEADS=heads,
        TILE=triton.next_power_of_2(dim),
        VALUE_TILE=triton.next_power_of_2(value_dim),
        num_warps=warps(heads * tile),
    )


def heads_together(x: Tensor) -> Tensor:
    """The same [T, H, D] with the heads of a token side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def heads_per_program(num_heads: int, tile: int) -> int:
    """How many heads of so many numbers a program serves, of a token that has `num_heads`."""
    return min(max(1, _TILE // tile), triton.next_power_of_2(num_heads))


def warps(numbers: int) -> int:
    """So many that a thread has eight of a program's numbers, 128 bits of bfloat16."""
    return min(8, max(1, numbers // 256))


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads [..., D] in eight bits, and their scales [...], in plain torch."""
    wide = x.float()
    scales = wide.abs().amax(-1) / LIMITS[dtype]
    scaled = wide * torch.where(scales > 1e-36, 1 / scales, 0.0)[..., None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def reference(
    key: Tensor,
    value: Tensor | None,
    keys: Tensor,
    key_scales: Tensor | None,
    values: Tensor | None,
    value_scales: Tensor | None,
    slots: Tensor,
) -> None:
    """`kv_write`, token by token."""
    sides = ((key, keys, key_scales), (value, values, value_scales))
    for numbers, data, scales in sides:
        if numbers is None or data is None:
            continue
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, data.shape[2])
            if scales is None:
                data[block, :, offset] = numbers[token].to(data.dtype)
            else:
                stored, scale = quantized(numbers[token], data.dtype)
                data[block, :, offset], scales[block, :, offset] = stored, scale


def variants() -> tuple[Variant, ...]:
    """The latent of DeepSeek-V3, and the heads of Gemma 4's wide layers."""
    return (_variant(1, 576, None), _variant(4, 512, 512), _variant(4, 512, 512, "i8"))


def _variant(num_heads: int, dim: int, value_dim: int | None, pool: str = "bf16") -> Variant:
    signature = {
        **dict.fromkeys(("key", "value"), "*bf16"),
        **dict.fromkeys(("keys", "values"), f"*{pool}"),
        **dict.fromkeys(("key_scales", "value_scales"), "*fp32"),
        "slots": "*i64",
        **dict.fromkeys(("key_stride", "value_stride"), "i32"),
    }
    tile = triton.next_power_of_2(dim)
    heads = heads_per_program(num_heads, tile)
    constants = {
        **{"NUM_HEADS": num_heads, "DIM": dim, "VALUE_DIM": value_dim or dim, "BLOCK_SIZE": 64},
        **{"LIMIT": 127.0, "HEADS": heads, "TILE": tile, "VALUE_TILE": tile},
    }
    absent = ("key_scales", "value_scales") if pool == "bf16" else ()
    absent = absent if value_dim else (*absent, "value", "values")
    return Variant(
        f"kv_write-{pool}-{num_heads}x{dim}",
        _write_kernel,
        {name: kind for name, kind in signature.items() if name not in absent},
        constants | dict.fromkeys(absent),
        num_warps=warps(heads * tile),
    )
