"""Rotary positions of queries and keys, each head after an optional norm, and what becomes of them:

    q, k = rope(norm(q)), rope(norm(k));   k and v go to the KV blocks, q is returned

in one kernel, which rounds where the three alone would: after the norm, and after the rotation.
q [T, H, D], k [T, K, D], v [T, K, W]; cos and sin [T, 1, R]: the first R numbers of a head turn in
pairs of neighbours or of halves: y = x * cos + other * sin, sin negated for the first of a pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_models.gpu import rms_norm
from vllm_models.gpu.kv_write import (
    LIMITS,
    heads_per_program,
    heads_together,
    store_heads,
    warps,
    write_heads,
)
from vllm_models.gpu.launch import Variant
from vllm_models.gpu.rotary_heads import Turn, rope_heads, turned_heads

Norm = tuple[Tensor, float, float]  # weight [D], epsilon, offset of the weight
_NO_NORM = (None, 0.0, 0.0)


@triton.jit
def _rope_kernel(
    out,
    x,
    cos,
    sin,
    weight,
    eps,
    stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    OFFSET: tl.constexpr,
    TURN: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cos += token * TURN.turned
    sin += token * TURN.turned
    first = tl.program_id(1) * HEADS
    rope_heads(out, x, token, first, stride, cos, sin, weight, eps, NUM_HEADS, HEADS, OFFSET, TURN)


@triton.jit
def _rope_write_kernel(
    out,
    q,
    k,
    v,
    cos,
    sin,
    q_weight,
    k_weight,
    q_eps,
    k_eps,
    keys,
    key_scales,
    values,
    value_scales,
    slots,
    q_stride,
    k_stride,
    v_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    K_OFFSET: tl.constexpr,
    TURN: tl.constexpr,
    VALUE_TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    q_programs: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(1)
    cos += token * TURN.turned
    sin += token * TURN.turned
    if program < q_programs:
        rope_heads(
            *(out, q, token, program * HEADS, q_stride, cos, sin, q_weight, q_eps),
            *(NUM_HEADS, HEADS, Q_OFFSET, TURN),
        )
    else:
        heads = (program - q_programs) * HEADS + tl.arange(0, HEADS)
        there = heads < NUM_KV_HEADS
        slot = tl.load(slots + token).to(tl.int64)
        row = (slot // BLOCK_SIZE * NUM_KV_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
        source = k + token * k_stride + heads * TURN.dim
        turned = turned_heads(source, there, cos, sin, k_weight, k_eps, K_OFFSET, TURN)
        store_heads(turned, there, keys, key_scales, row, TURN.dim, LIMIT, TURN.tile)
        source = v + token * v_stride + heads * VALUE_DIM
        write_heads(source, there, values, value_scales, row, VALUE_DIM, LIMIT, VALUE_TILE)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, norm: Norm | None = None
) -> Tensor:
    """Rotate all heads of all tokens: [T, H, D] -> [T, H, D], contiguous.

    Args:
        x: Tokens may be apart.
        cos: [T, 1, R] contiguous.
        sin: Like cos.
        interleaved: Pairs are neighbours, not halves.
        norm: Of each head before: weight, epsilon, and the offset of the weight.
    """
    x = heads_together(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight, eps, offset = norm or _NO_NORM
    num_tokens, num_heads, dim = x.shape
    turn = Turn(dim, cos.shape[-1], interleaved)
    heads = heads_per_program(num_heads, turn.tile)
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        *(out, x, cos, sin, weight, eps, x.stride(0)),
        NUM_HEADS=num_heads,
        HEADS=heads,
        OFFSET=offset,
        TURN=turn,
        num_warps=warps(heads * turn.tile),
    )
    return out


def rope_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor, bool],
    norms: tuple[Norm | None, Norm | None],
    keys: tuple[Tensor, Tensor | None],
    values: tuple[Tensor, Tensor | None],
    slots: Tensor,
) -> Tensor:
    """Rotate queries and keys, write keys and values; returns queries [T, H, D].

    Args:
        q: [T, H, D]; tokens may be apart.
        k: [T, K, D], likewise.
        v: [T, K, W], likewise.
        rotation: Cosine and sine [T, 1, R], contiguous, and whether pairs are neighbours.
        norms: Of query heads and of key heads before.
        keys: [B, K, P, D], and scales [B, K, P] if they have eight bits.
        values: [B, K, P, W], and scales, of the same type.
        slots: [T] integers.
    """
    (cos, sin, interleaved), (q, k, v) = rotation, (heads_together(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    (num_tokens, num_heads, dim), (num_kv_heads, value_dim) = q.shape, v.shape[1:]
    q_norm, k_norm = (norm or _NO_NORM for norm in norms)
    turn, value_tile = Turn(dim, cos.shape[-1], interleaved), triton.next_power_of_2(value_dim)
    tile = max(turn.tile, value_tile)
    heads = heads_per_program(num_heads, tile)
    programs = triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, heads)
    _rope_write_kernel[(num_tokens, programs)](
        *(out, q, k, v, cos, sin, q_norm[0], k_norm[0], q_norm[1], k_norm[1]),
        *(*keys, *values, slots, q.stride(0), k.stride(0), v.stride(0)),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        VALUE_DIM=value_dim,
        BLOCK_SIZE=keys[0].shape[2],
        LIMIT=LIMITS.get(keys[0].dtype, 1.0),
        HEADS=heads,
        Q_OFFSET=q_norm[2],
        K_OFFSET=k_norm[2],
        TURN=turn,
        VALUE_TILE=value_tile,
        num_warps=warps(heads * tile),
    )
    return out


def reference(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, norm: Norm | None = None
) -> Tensor:
    """`rope` in plain torch."""
    if norm is not None:
        x = rms_norm.reference(x, *norm)
    width = cos.shape[-1]
    turns = x[..., :width].float()
    if interleaved:
        other = turns.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = turns.roll(width // 2, dims=-1)
    out = (turns * cos.float() + other * sin.float()).to(x.dtype)
    return torch.cat((out, x[..., width:]), dim=-1)


def variants() -> tuple[Variant, ...]:
    """Qwen3-0.6B, Qwen3-30B-A3B (both with norms), and Llama-3.1-8B."""
    return (
        _variant("qwen3-0.6b", 16, 8, 128, has_norm=True),
        _variant("qwen3-30b-a3b", 32, 4, 128, has_norm=True),
        _variant("qwen3-0.6b", 16, 8, 128, has_norm=True, pool="i8"),
        _variant("qwen3-0.6b", 16, 8, 128, has_norm=True, pool="fp8e4nv"),
        _variant("llama-3.1-8b", 32, 8, 128, has_norm=False),
        _variant("llama-3.1-8b", 32, 8, 128, has_norm=False, pool="i8"),
    )


def _variant(
    name: str, num_heads: int, num_kv_heads: int, dim: int, has_norm: bool, pool: str = "bf16"
) -> Variant:
    signature = {
        **dict.fromkeys(("out", "q", "k", "v", "cos", "sin", "q_weight", "k_weight"), "*bf16"),
        **dict.fromkeys(("q_eps", "k_eps"), "fp32"),
        **dict.fromkeys(("keys", "values"), f"*{pool}"),
        **dict.fromkeys(("key_scales", "value_scales"), "*fp32"),
        "slots": "*i64",
        **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32"),
    }
    absent = [] if has_norm else ["q_weight", "k_weight"]
    absent += ["key_scales", "value_scales"] if pool == "bf16" else []
    heads = heads_per_program(num_heads, dim)
    sizes = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "VALUE_DIM": dim}
    tiles = {"HEADS": heads, "VALUE_TILE": dim, "BLOCK_SIZE": 64}
    rest = {"LIMIT": 127.0, "Q_OFFSET": 0.0, "K_OFFSET": 0.0, "TURN": Turn(dim, dim, False)}
    return Variant(
        f"rope_write-{pool}-{name}",
        _rope_write_kernel,
        {argument: kind for argument, kind in signature.items() if argument not in absent},
        {**sizes, **tiles, **rest, **dict.fromkeys(absent)},
        num_warps=warps(heads * dim),
    )
