"""Layers and embeddings whose weights are blocks of a GGUF file."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.gguf.dequantize import QUANTIZED_TYPES, dequantize
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.gguf.types import GgmlType, block_bytes, block_size
from vllm_models.gpu.grouped_matmul import grouped_matmul
from vllm_models.gpu.grouped_rows import gather_rows
from vllm_models.gpu.layout import numbers_of
from vllm_models.quantization.block_planes import block_planes
from vllm_models.quantization.blocks import Blocks, blocks_or_plain
from vllm_models.quantization.mxfp4 import Mxfp4

T = GgmlType
_MAKERS = QUANTIZED_TYPES - {T.IQ4_NL, T.IQ4_XS, T.MXFP4}
KINDS = sorted(QUANTIZED_TYPES, key=lambda kind: kind.name)
# More than the file: factors of scales are not packed, minima take whole bytes.
WIDER = {T.Q2_K: 0.5, T.Q3_K: 0.125, T.Q4_K: 0.125, T.Q5_K: 0.125, T.IQ4_XS: 0.0625}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def blocks_of(kind: GgmlType, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random blocks and the weights that they stand for."""
    if kind in _MAKERS:
        blocks = quantize(torch.randn(rows, columns), kind)
    else:
        num_blocks = rows * columns // block_size(kind)
        blocks = torch.randint(0, 256, (num_blocks, block_bytes(kind)), dtype=torch.uint8)
        if kind == T.MXFP4:
            blocks[:, 0] = torch.randint(120, 130, (num_blocks,))
        else:
            blocks[:, :2] = (torch.rand(num_blocks, 1) / 100).half().view(torch.uint8)
        blocks = blocks.view(rows, -1)
    return blocks, dequantize(blocks, kind, columns)


def width(kind: GgmlType) -> int:
    return 512 if block_size(kind) == 256 else 288


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_planes_have_the_numbers_of_the_file(kind: GgmlType, device: torch.device) -> None:
    blocks, expected = blocks_of(kind, 6, width(kind))
    planes = block_planes(blocks.to(device), kind, width(kind))
    found = numbers_of(planes).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    rows = torch.tensor([5, 0, 5], device=device)
    gathered = gather_rows(planes, rows).cpu()
    torch.testing.assert_close(gathered, expected[rows.cpu()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_planes_take_little_more_memory_than_the_file(kind: GgmlType, device: torch.device) -> None:
    blocks, _ = blocks_of(kind, 4, 512)
    planes = block_planes(blocks.to(device), kind, 512)
    held = sum(t.nbytes for t in planes.tensors if t is not None and t is not planes.table)
    bits = 8 * held / (4 * 512)
    assert bits <= 8 * block_bytes(kind) / block_size(kind) + WIDER.get(kind, 0)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_product_is_that_of_the_numbers(kind: GgmlType, rows: int, device: torch.device) -> None:
    blocks, expected = blocks_of(kind, 21, width(kind))
    planes = block_planes(blocks.to(device), kind, width(kind))
    x = torch.randn(rows, width(kind))
    found = grouped_matmul(x.to(device), planes).cpu()
    torch.testing.assert_close(found, x @ expected.T, rtol=1e-4, atol=1e-3)


def fill(layer: Linear, kinds: Mapping[str, GgmlType]) -> Tensor:
    """Blocks for every part; the weight that they stand for."""
    layer.use(Blocks(kinds))
    expected: list[Tensor] = []
    for part, (_, place) in zip(kinds, layer.places("a"), strict=True):
        blocks, numbers = blocks_of(kinds[part], place.shape[0], layer.in_features)
        place.take(blocks)
        expected.append(numbers)
    layer.method.pack(layer)
    return torch.cat(expected)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("fixed_order", [False, True])
def test_parts_may_have_types_of_their_own(fixed_order: bool, device: torch.device) -> None:
    layer = Linear(256, {"q": 24, "k": 8, "v": 8})
    with torch.device("cpu"):
        expected = fill(layer, {"q": T.Q4_K, "k": T.Q4_K, "v": T.Q6_K}).to(device)
    layer.fixed_order = fixed_order
    torch.testing.assert_close(layer.method.dequantize(layer), expected, rtol=1e-5, atol=1e-5)
    x = torch.randn(9, 256)
    found = layer(x)
    torch.testing.assert_close(found, x @ expected.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x[4:5]), found[4:5]) or not fixed_order


@pytest.mark.usefixtures("on_gpu")
def test_blocks_may_stand_beside_plain_numbers(device: torch.device) -> None:
    layer = Linear(256, {"q": 16, "k": 8, "v": 8}, bias=True)
    assert layer.bias is not None
    layer.bias.copy_(torch.randn(32))
    method = blocks_or_plain({"q": T.Q5_K, "k": None, "v": T.Q3_K}, Blocks)
    assert method is not None
    layer.use(method)
    with torch.device("cpu"):
        weights = {"q": T.Q5_K, "v": T.Q3_K}
        made = {part: blocks_of(kind, layer.parts[part], 256) for part, kind in weights.items()}
        made["k"] = (torch.randn(8, 256),) * 2
    for name, place in layer.places("a"):
        if name.endswith("weight"):
            place.take(made[name[0]][0])
    layer.method.pack(layer)
    expected = torch.cat([made[part][1] for part in layer.parts]).to(device)
    x = torch.randn(3, 256)
    for layer.fixed_order in (False, True):
        found = layer(x)
        torch.testing.assert_close(found, x @ expected.T + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_gpu")
def test_a_packed_layer_is_freed_with_its_last_user() -> None:
    layer = Linear(256, 8)
    with torch.device("cpu"):
        fill(layer, {"": T.Q4_K})
    alive = weakref.ref(layer)
    del layer
    assert alive() is None


@pytest.mark.usefixtures("on_gpu")
def test_an_embedding_is_looked_up_and_multiplies_as_a_head(device: torch.device) -> None:
    table = Embedding(40, 256)
    with torch.device("cpu"):
        expected = fill(table, {"": T.Q6_K}).to(device)
    ids = torch.tensor([39, 0, 7])
    torch.testing.assert_close(table(ids), expected[ids], rtol=1e-5, atol=1e-5)
    hidden = torch.randn(2, 256)
    torch.testing.assert_close(table.logits(hidden), hidden @ expected.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_gpu")
def test_floats_of_4_bits_from_a_checkpoint(device: torch.device) -> None:
    layer = Linear(64, {"gate": 8, "up": 8})
    layer.use(Mxfp4())
    for name, place in layer.places("a"):
        low, high = (120, 130) if name.endswith("scales") else (0, 256)
        place.take(torch.randint(low, high, place.shape, dtype=torch.uint8))
    with torch.device("cpu"):
        blocks = layer.get_parameter("blocks_0").cpu()
        expected = dequantize(blocks, T.MXFP4, 64).to(device)
    layer.method.pack(layer)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-3)
