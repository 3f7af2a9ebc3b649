"""Every format's published layout as plain loops: numbers in, tensors of a checkpoint out.

A packer takes a weight [O, K] and returns what the checkpoint holds, by suffix, and the weight
[O, K] float32 that these tensors stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Saved = dict[str, Tensor]


class Packed(NamedTuple):
    tensors: Saved
    weight: Array


def words(codes: list[int], bits: int) -> list[int]:
    """Integers as 32-bit words, the first in the lowest bits."""
    per_word = 32 // bits
    out: list[int] = []
    for first in range(0, len(codes), per_word):
        word = 0
        for place, code in enumerate(codes[first : first + per_word]):
            word |= code << (place * bits)
        out.append(word)
    return out


def int32(values: Array) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.uint32).view(np.int32).copy())


def quantize(
    weight: Array, bits: int, groups: Array, symmetric: bool
) -> tuple[Array, Array, Array]:
    """codes [O, K], scales float16 [O, G], zeros [O, G] with groups [K] of each column."""
    num_groups, top = int(groups.max()) + 1, 2**bits - 1
    rows, columns = weight.shape
    codes = np.zeros((rows, columns), dtype=np.int64)
    scales = np.zeros((rows, num_groups), dtype=np.float16)
    zeros = np.zeros((rows, num_groups), dtype=np.int64)
    for group in range(num_groups):
        part = weight[:, groups == group]
        if symmetric:
            scale = np.abs(part).max(1) * 2 / top
            zeros[:, group] = 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / top
            zeros[:, group] = np.round(-low / scale)
        scales[:, group] = scale
        exact = scales[:, group].astype(np.float32)[:, None]
        codes[:, groups == group] = np.round(part / exact) + zeros[:, group][:, None]
    return np.clip(codes, 0, top), scales, zeros


def restore(codes: Array, scales: Array, zeros: Array, groups: Array) -> Array:
    out = np.zeros(codes.shape, dtype=np.float32)
    for k in range(codes.shape[1]):
        group = groups[k]
        scale = scales[:, group].astype(np.float32)
        out[:, k] = (codes[:, k] - zeros[:, group]).astype(np.float32) * scale
    return out


def gptq(
    weight: Array,
    bits: int = 4,
    group_size: int = 32,
    order_seed: int | None = None,
    symmetric: bool = False,
    version: int = 1,
) -> Packed:
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    if order_seed is not None:
        groups = np.random.default_rng(order_seed).permutation(groups)
    codes, scales, zeros = quantize(weight, bits, groups, symmetric)
    qweight = np.array([words(codes[o].tolist(), bits) for o in range(rows)]).T
    qzeros = np.array([words(zeros[:, g].tolist(), bits) for g in range(columns // size)])
    if version == 1:
        qzeros = (qzeros - sum(1 << shift for shift in range(0, 32, bits))) % 2**32
    tensors = {
        "qweight": int32(qweight),
        "qzeros": int32(qzeros),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return Packed(tensors, restore(codes, scales, zeros, groups))


def marlin(weight: Array, group_size: int = 128) -> Packed:
    """As the kernel's authors pack: tiles of 16 x 16, threads of a warp, even codes first."""
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    codes, scales, zeros = quantize(weight, 4, groups, True)
    order: list[int] = []
    for i in range(32):
        own = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1):
                own.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            order.extend(p + 256 * j for p in own)
    shuffled = [order[first + i] for first in range(0, 1024, 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    packed = []
    for tile_k in range(columns // 16):
        line: list[int] = []
        for tile_o in range(rows // 16):
            for k in range(16):
                line.extend(int(codes[tile_o * 16 + o, tile_k * 16 + k]) for o in range(16))
        stored: list[int] = []
        for first in range(0, len(line), 1024):
            stored.extend(line[first + p] for p in shuffled)
        packed.append(words(stored, 4))
    if size < columns:
        place = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        place = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    s = scales.T.reshape(-1, len(place))[:, place].reshape(-1, rows)
    tensors = {"B": int32(packed), "s": torch.from_numpy(s.copy())}
    return Packed(tensors, restore(codes, scales, zeros, groups))


def awq(weight: Array, group_size: int = 32) -> Packed:
    rows, columns = weight.shape
    groups = np.arange(columns) // group_size
    codes, scales, zeros = quantize(weight, 4, groups, False)

    def pack(values: Array) -> Tensor:  # [n, O]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        out = np.zeros((len(values), rows // 8), dtype=np.uint32)
        for n in range(len(values)):
            for word in range(rows // 8):
                out[n, word] = words([int(values[n, 8 * word + i]) for i in order], 4)[0]
        return int32(out)

    scales_t = torch.from_numpy(scales.T.copy())
    tensors = {"qweight": pack(codes.T), "qzeros": pack(zeros.T), "scales": scales_t}
    return Packed(tensors, restore(codes, scales, zeros, groups))


def compressed_integers(
    weight: Array,
    bits: int = 4,
    group_size: int = 32,
    order_seed: int | None = None,
    symmetric: bool = True,
) -> Packed:
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    if order_seed is not None:
        groups = np.random.default_rng(order_seed).permutation(groups)
    codes, scales, zeros = quantize(weight, bits, groups, symmetric)
    packed = [words(codes[o].tolist(), bits) for o in range(rows)]
    tensors = {
        "weight_packed": int32(packed),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        by_group = [words(zeros[:, g].tolist(), bits) for g in range(columns // size)]
        tensors["weight_zero_point"] = int32(np.array(by_group).T)
    if order_seed is not None:
        tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return Packed(tensors, restore(codes, scales, zeros, groups))


def fp8(weight: Array, form: str = "tensor", suffix: str = "weight_scale") -> Packed:
    """`form` "tensor", "row", or "RxC" for blocks of R rows and C columns."""
    rows, columns = weight.shape
    if form in ("tensor", "row"):
        high, wide = (rows if form == "tensor" else 1), columns
    else:
        high, wide = map(int, form.split("x"))
    scales = np.zeros((-(-rows // high), -(-columns // wide)), dtype=np.float32)
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    out = np.zeros((rows, columns), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scales[i, j] = np.abs(weight[place]).max() / 448
            codes[place] = torch.from_numpy(weight[place] / scales[i, j]).to(codes.dtype)
            out[place] = codes[place].float().numpy() * scales[i, j]
    saved = torch.from_numpy(scales)
    return Packed({"weight": codes, suffix: saved[0, 0] if form == "tensor" else saved}, out)


NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]


def bitsandbytes(weight: Array, nested: bool = False, group_size: int = 64) -> Packed:
    rows, columns = weight.shape
    table = np.array(NF4, dtype=np.float32)
    flat = weight.reshape(-1, group_size)
    scales = np.abs(flat).max(1).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": group_size, "dtype": "bfloat16"}
    state["shape"] = [rows, columns]
    tensors: Saved = {"weight.quant_map": torch.from_numpy(table)}
    if nested:
        offset = float(np.float32(scales.mean()))
        table8 = np.linspace(-1, 1, 256, dtype=np.float32)
        codes8, tops = [], []
        for first in range(0, len(scales), 256):
            part = scales[first : first + 256] - np.float32(offset)
            tops.append(np.float32(np.abs(part).max()))
            codes8 += [int(np.abs(table8 - value / tops[-1]).argmin()) for value in part]
        scales = np.array(
            [table8[c] * tops[i // 256] + np.float32(offset) for i, c in enumerate(codes8)],
            dtype=np.float32,
        )
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        tensors["weight.absmax"] = torch.tensor(codes8, dtype=torch.uint8)
        tensors["weight.nested_absmax"] = torch.from_numpy(np.array(tops, dtype=np.float32))
        tensors["weight.nested_quant_map"] = torch.from_numpy(table8)
    else:
        tensors["weight.absmax"] = torch.from_numpy(scales)
    codes = np.abs(flat[..., None] / scales[:, None, None] - table).argmin(-1)
    line = codes.reshape(-1)
    packed = [int(line[i]) << 4 | int(line[i + 1]) for i in range(0, len(line), 2)]
    tensors["weight"] = torch.tensor(packed, dtype=torch.uint8)[:, None]
    text = json.dumps(state).encode()
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return Packed(tensors, (table[codes] * scales[:, None]).reshape(rows, columns))


Packer = Callable[[Array], Packed]
