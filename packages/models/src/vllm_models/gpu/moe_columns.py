"""Rows of x whose columns stand in the order in which an expert holds those of its weight.

    out[p, k] = x[p // (P / rows of x), orders[expert of p, k]]

x [T, K] or [P, K], chosen [T, k] experts, orders [E, K] -> [P, K],  P = T * k pairs
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu.launch import Variant

_TILE = 1024


@triton.jit
def _order_kernel(out, x, chosen, orders, pairs_per_row, columns, TILE: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    there = column < columns
    expert = tl.load(chosen + pair).to(tl.int64)
    source = tl.load(orders + expert * columns + column, mask=there & (expert >= 0), other=0)
    numbers = tl.load(x + pair // pairs_per_row * columns + source, mask=there, other=0.0)
    tl.store(out + pair * columns + column, numbers, mask=there)


def order_columns(x: Tensor, chosen: Tensor, orders: Tensor) -> Tensor:
    """A row for every pair: [T * k, K].

    Args:
        x: [T, K] of which each row is used by k pairs, or [T * k, K]; contiguous.
        chosen: [T, k] int32 or int64, contiguous; rows of experts below 0 mean nothing.
        orders: int32 [E, K].
    """
    num_pairs, columns = chosen.numel(), x.shape[1]
    out = torch.empty((num_pairs, columns), dtype=x.dtype, device=x.device)
    if num_pairs > 0:
        tile = min(_TILE, triton.next_power_of_2(columns))
        _order_kernel[(num_pairs, triton.cdiv(columns, tile))](
            out, x, chosen, orders, num_pairs // len(x), columns, TILE=tile
        )
    return out


def reference(x: Tensor, chosen: Tensor, orders: Tensor) -> Tensor:
    """`order_columns`."""
    rows = x.repeat_interleave(chosen.numel() // len(x), 0)
    return rows.gather(1, orders[chosen.flatten().long()].long())


def variants() -> tuple[Variant, ...]:
    """For any sizes."""
    signature = {"out": "*bf16", "x": "*bf16", "chosen": "*i32", "orders": "*i32"}
    signature |= dict.fromkeys(("pairs_per_row", "columns"), "i32")
    return (Variant("moe_columns", _order_kernel, signature, {"TILE": _TILE}),)
