"""Linear layers and embeddings whose weights are the blocks of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.gguf.dequantize import dequantize
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.gguf.types import GgmlType, row_bytes
from vllm_models.quantization.blocks import Blocks, GgufScheme
from vllm_models.weights.saved import SavedTensor

T = GgmlType
COLUMNS = 512


def saved(kinds: Mapping[str, GgmlType], widths: Mapping[str, int]) -> dict[str, SavedTensor]:
    torch.manual_seed(0)
    found: dict[str, SavedTensor] = {}
    for part, kind in kinds.items():
        blocks = quantize(torch.randn(widths[part], COLUMNS), kind)
        value = blocks.view(torch.float16) if kind == T.F16 else blocks
        shape, name = (widths[part], COLUMNS), f"{part}.weight"
        found[name] = SavedTensor(
            name, shape, kind.name, "f.gguf", value.nbytes, lambda v=value: v, lambda: None
        )
    return found


def fill(layer: Linear, tensors: Mapping[str, SavedTensor], path: str = "a") -> Tensor:
    """Load a layer as the loader does; its weight as it should be."""
    names = [layer.name_of(path, part) for part in layer.parts]
    method = GgufScheme().method(names, layer, tensors)
    assert method is not None
    layer.use(method)
    expected: list[Tensor] = []
    for name, place in layer.places(path):
        tensor = tensors[name]
        assert tensor.shape == place.shape and tensor.kind in place.kinds
        place.take(tensor.read())
        kind = T[tensor.kind]
        expected.append(dequantize(tensor.read().view(torch.uint8), kind, COLUMNS))
    layer.method.pack(layer)
    return torch.cat(expected)


WIDTHS = {"q": 24, "k": 8, "v": 8}
LAYERS: dict[str, dict[str, GgmlType]] = {
    "one-type": {"q": T.Q4_K, "k": T.Q4_K, "v": T.Q4_K},
    "values-higher": {"q": T.Q4_K, "k": T.Q4_K, "v": T.Q6_K},
    "all-different": {"q": T.Q4_0, "k": T.Q8_0, "v": T.Q5_1},
    "back-again": {"q": T.Q3_K, "k": T.Q8_0, "v": T.Q3_K},
    "plain-beside-blocks": {"q": T.Q2_K, "k": T.F16, "v": T.Q5_K},
}


@pytest.mark.parametrize("kinds", LAYERS.values(), ids=LAYERS)
def test_a_layer_multiplies_by_the_weights_its_blocks_stand_for(
    kinds: Mapping[str, GgmlType],
) -> None:
    layer = Linear(COLUMNS, WIDTHS)
    weight = fill(layer, saved(kinds, WIDTHS))
    assert torch.equal(layer.method.dequantize(layer), weight)
    x = torch.randn(5, COLUMNS)
    expected = x.double() @ weight.double().T
    error = (layer(x).double() - expected).norm() / expected.norm()
    assert error < 0.01  # kernels may round activations to 8 bits


def test_tiles_together_are_the_whole_product() -> None:
    widths = {"": 5000}
    layer = Linear(COLUMNS, widths[""])
    weight = fill(layer, saved({"a": T.Q8_0}, {"a": 5000}))
    x = torch.randn(2, COLUMNS)
    bias = torch.randn(5000)
    expected = x @ weight.T + bias
    found = layer.method.apply(layer, x, bias)
    assert (found - expected).norm() / expected.norm() < 0.01


def test_blocks_are_all_that_is_held() -> None:
    layer = Linear(COLUMNS, WIDTHS)
    layer.use(Blocks({"q": T.Q4_K, "k": T.Q4_K, "v": T.Q6_K}))
    held = sum(parameter.nbytes for parameter in layer.parameters())
    assert held == 32 * row_bytes(T.Q4_K, COLUMNS) + 8 * row_bytes(T.Q6_K, COLUMNS)
    assert len(list(layer.parameters())) == 2


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q8_0, T.Q6_K], ids=lambda kind: kind.name)
def test_an_embedding_gathers_rows_of_blocks(kind: GgmlType) -> None:
    layer = Embedding(50, COLUMNS)
    weight = fill(layer, saved({"a": kind}, {"a": 50}))
    rows = torch.tensor([3, 49, 3, 0])
    assert torch.equal(layer(rows), weight[rows])
    x = torch.randn(2, COLUMNS)
    expected = x @ weight.T
    assert (layer.logits(x) - expected).norm() / expected.norm() < 0.01


def test_plain_layers_are_left_as_they_are() -> None:
    layer = Linear(COLUMNS, 8)
    assert GgufScheme().method(["a"], layer, saved({"a": T.F16}, {"a": 8})) is None
