"""Products with plain weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.gpu import matmul

SHAPES = [(37, 80), (64, 1024), (16, 300)]  # rows and columns of a weight


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def numbers(rows: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """x, weight and bias."""
    x, weight, bias = torch.randn(rows, shape[1]), torch.randn(shape), torch.randn(shape[0])
    return x.to(device), weight.to(device), bias.to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 17, 65])
def test_tiles_multiply(rows: int, shape: tuple[int, int], device: torch.device) -> None:
    x, weight, bias = numbers(rows, shape, device)
    expected = matmul.reference(x, weight, bias)
    torch.testing.assert_close(matmul.matmul_tiles(x, weight, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_few_rows_multiply(rows: int, shape: tuple[int, int], device: torch.device) -> None:
    x, weight, bias = numbers(rows, shape, device)
    expected = matmul.reference(x, weight, bias)
    torch.testing.assert_close(matmul.matmul_rows(x, weight, bias), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("multiply", [matmul.matmul_tiles, matmul.matmul_rows])
def test_sixteen_bits_are_added_up_in_float32(multiply, device: torch.device) -> None:
    x, weight, bias = (value.bfloat16() for value in numbers(3, (24, 512), device))
    found = multiply(x, weight, bias)
    assert found.dtype == torch.bfloat16
    expected = matmul.reference(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [80, 1024])
def test_a_fixed_order_gives_a_row_the_same_bits_in_every_batch(
    columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, bias = (value.to(dtype) for value in numbers(67, (24, columns), device))
    together = matmul.dense_matmul(x, weight, bias, fixed_order=True)
    for first, last in ((0, 1), (66, 67), (30, 50)):
        some = matmul.dense_matmul(x[first:last], weight, bias, fixed_order=True)
        assert torch.equal(some, together[first:last])


def test_few_rows_of_small_weights_do_without_the_library() -> None:
    assert matmul.dense_path(1, 2048, 1024) == "rows"
    assert matmul.dense_path(8, 2048, 1024) == "rows"
    assert matmul.dense_path(9, 2048, 1024) == "library"
    assert matmul.dense_path(1, 4096, 4096) == "library"


@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 64), (0, 64), (64,)])
def test_any_number_of_dimensions(
    shape: tuple[int, ...], fixed_order: bool, device: torch.device
) -> None:
    x, weight = torch.randn(shape, device=device), torch.randn(32, 64, device=device)
    found = matmul.dense_matmul(x, weight, None, fixed_order)
    torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_gpu")
def test_a_layer_is_multiplied_in_a_fixed_order_when_it_says_so(device: torch.device) -> None:
    layer = Linear(48, {"a": 24, "b": 8}, bias=True)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    layer.method.pack(layer)
    x = torch.randn(40, 48)
    assert layer.packed is None and layer.bias is not None
    expected = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.fixed_order = True
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x[7:8]), found[7:8])


@pytest.mark.usefixtures("on_gpu")
def test_embeddings_are_looked_up_and_multiply_as_a_head() -> None:
    table = Embedding(20, 16)
    table.weight.copy_(torch.randn(20, 16))
    table.method.pack(table)
    ids = torch.tensor([3, 19, 3])
    found = table(ids)
    assert torch.equal(found, table.weight[ids])
    torch.testing.assert_close(table.logits(found), found @ table.weight.T)
