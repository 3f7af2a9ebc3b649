"""Dequantized blocks against the reference of the format, bit for bit."""

from __future__ import annotations

from itertools import product

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as reference
from torch import Tensor
from vllm_models.gguf.dequantize import QUANTIZED_TYPES, dequantize, unpack
from vllm_models.gguf.types import GgmlType, block_bytes, block_size, row_bytes

# Where a block has f16 numbers.
HALVES = {
    **dict.fromkeys((GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0), (0,)),
    **dict.fromkeys((GgmlType.IQ4_NL, GgmlType.IQ4_XS), (0,)),
    **dict.fromkeys((GgmlType.Q4_1, GgmlType.Q5_1, GgmlType.Q4_K, GgmlType.Q5_K), (0, 2)),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q6_K: (208,),
    GgmlType.MXFP4: (),
}
KINDS = sorted(QUANTIZED_TYPES)
FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
# Zeros, the smallest and largest f16, a subnormal one, and ordinary ones.
SCALES = np.array([0.0, -0.0, 6e-8, -6e-8, 5.9e-5, 65504.0, -65504.0, 0.37, -1.7e-3], np.float16)


def random_blocks(kind: GgmlType, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Bytes of blocks [N, bytes]; f16 numbers are finite, everything else is anything."""
    numbers = np.random.default_rng(seed)
    blocks = numbers.integers(0, 256, (num_blocks, block_bytes(kind)), dtype=np.uint8)
    for place in HALVES[kind]:
        halves = numbers.standard_normal(num_blocks).astype(np.float16)
        blocks[:, place : place + 2] = halves[:, None].view(np.uint8)
    return blocks


def with_scales(kind: GgmlType, fill: int) -> np.ndarray:
    """Blocks of one byte over and over, with every pair of scales."""
    pairs = np.array(list(product(SCALES, SCALES)), np.float16)
    blocks = np.full((len(pairs), block_bytes(kind)), fill, np.uint8)
    for index, place in enumerate(HALVES[kind]):
        blocks[:, place : place + 2] = pairs[:, index : index + 1].copy().view(np.uint8)
    return blocks


def expected(blocks: np.ndarray, kind: GgmlType) -> np.ndarray:
    with np.errstate(over="ignore"):  # the largest exponents of MXFP4 give infinity
        return reference(blocks, gguf.GGMLQuantizationType(kind))


def bits(weights: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(weights).view(np.uint32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_random_blocks_are_those_of_the_reference(kind: GgmlType) -> None:
    rows = random_blocks(kind, 7 * 3).reshape(7, -1)
    found = dequantize(torch.from_numpy(rows.copy()), kind, 3 * block_size(kind))
    assert found.shape == (7, 3 * block_size(kind))
    assert found.dtype == torch.float32
    assert np.array_equal(bits(found), bits(expected(rows, kind)))


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x5A, 0x80])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_extreme_blocks_are_those_of_the_reference(kind: GgmlType, fill: int) -> None:
    blocks = with_scales(kind, fill)
    found = dequantize(torch.from_numpy(blocks.copy()), kind, block_size(kind))
    assert np.array_equal(bits(found), bits(expected(blocks, kind)))


def test_every_exponent_of_mxfp4_is_that_of_the_reference() -> None:
    blocks = random_blocks(GgmlType.MXFP4, 256)
    blocks[:, 0] = np.arange(256)
    found = dequantize(torch.from_numpy(blocks.copy()), GgmlType.MXFP4, 32)
    assert np.array_equal(bits(found), bits(expected(blocks, GgmlType.MXFP4)))
    assert found[:253].isfinite().all()


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_may_be_part_of_a_larger_tensor(kind: GgmlType, num_rows: int) -> None:
    """Neither the address of the first byte nor the distance of rows need be even."""
    rows = random_blocks(kind, 2 * num_rows).reshape(num_rows, -1)
    wide = torch.zeros(num_rows, rows.shape[1] + 3, dtype=torch.uint8)
    wide[:, 1:-2] = torch.from_numpy(rows.copy())
    found = dequantize(wide[:, 1:-2], kind, 2 * block_size(kind))
    assert np.array_equal(bits(found), bits(expected(rows, kind)))


@pytest.mark.parametrize("kind", [*FLOATS, *KINDS], ids=lambda kind: kind.name)
def test_no_rows_give_no_weights(kind: GgmlType) -> None:
    columns = 2 * block_size(kind)
    none = torch.empty(0, row_bytes(kind, columns), dtype=torch.uint8)
    assert dequantize(none, kind, columns).shape == (0, columns)


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats_keep_their_values(kind: GgmlType) -> None:
    values = np.concatenate([SCALES, np.array([np.inf, -np.inf, 3.0], np.float16)])
    raw = gguf.quants.quantize(values.astype(np.float32)[None], gguf.GGMLQuantizationType(kind))
    rows = raw.view(np.uint8).reshape(1, -1)
    found = dequantize(torch.from_numpy(rows.copy()), kind, values.size)
    assert np.array_equal(bits(found), bits(expected(rows, kind)))
    moved = torch.zeros(1, rows.size + 1, dtype=torch.uint8)  # begins at an odd address
    moved[:, 1:] = torch.from_numpy(rows.copy())
    assert torch.equal(dequantize(moved[:, 1:], kind, values.size), found)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_unpacked_blocks_have_groups_and_small_codes(kind: GgmlType) -> None:
    found = unpack(torch.from_numpy(random_blocks(kind, 5)), kind)
    assert found.codes.dtype in (torch.int8, torch.uint8)
    num_blocks, groups, weights = found.codes.shape
    assert (num_blocks, groups * weights) == (5, block_size(kind))
    assert found.scale.shape == (5, groups, 1)
    assert found.offset is None or found.offset.shape == (5, groups, 1)


def test_integers_are_no_weights() -> None:
    with pytest.raises(ValueError, match="I32 is not a quantized type"):
        dequantize(torch.zeros(1, 16, dtype=torch.uint8), GgmlType.I32, 4)
