"""Weights in bfloat16 and float32: every instruction-set class against the textbook form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_models.native.dense import PackedDense, reference
from vllm_models.native.library import Library, load
from vllm_models.native.processor import InstructionSet, runnable

DTYPES = (torch.float32, torch.bfloat16)
ROWS = (1, 2, 3, 7, 16, 17, 33, 65, 300)  # 300 is more than a kernel keeps sums of


@pytest.fixture(params=runnable(), scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return load(InstructionSet(request.param))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "columns"), [(1, 1), (5, 2), (64, 64), (65, 31), (100, 258), (130, 1025)]
)
def test_products_are_those_of_the_reference(
    library: Library, dtype: torch.dtype, outputs: int, columns: int
) -> None:
    weight = numbers(outputs, columns).to(dtype)
    packed = PackedDense(library, weight)
    for rows in ROWS:
        x = numbers(rows, columns, seed=rows)
        got = packed.matmul(x, out=torch.full((rows, outputs), torch.nan))
        torch.testing.assert_close(got.double(), reference(weight, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch_and_with_any_number_of_threads(
    library: Library, dtype: torch.dtype
) -> None:
    packed = PackedDense(library, numbers(130, 1030).to(dtype))
    x = numbers(max(ROWS), 1030).to(dtype)
    whole = packed.matmul(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in ROWS:
                assert torch.equal(packed.matmul(x[-rows:]), whole[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("columns", [64, 65])
def test_activations_and_results_of_both_types_with_rows_apart(
    library: Library, dtype: torch.dtype, x_dtype: torch.dtype, columns: int
) -> None:
    weight, bias = numbers(70, columns).to(dtype), numbers(70, seed=3)
    packed = PackedDense(library, weight)
    x = numbers(4, columns + 3, seed=1).to(x_dtype)[:, 1 : columns + 1]
    room = torch.full((4, 90), 7.0, dtype=torch.bfloat16)
    packed.matmul(x, bias, out=room[:, 10:80])
    torch.testing.assert_close(
        room[:, 10:80].double(), reference(weight, x, bias), rtol=1e-2, atol=2e-2
    )
    assert (room[:, :10] == 7).all() and (room[:, 80:] == 7).all()
    assert packed.matmul(x).dtype == x_dtype
    assert packed.matmul(x, dtype=torch.float32).dtype == torch.float32


def test_a_result_in_bfloat16_is_the_float_result_rounded(library: Library) -> None:
    packed = PackedDense(library, numbers(64, 300).bfloat16())
    x = numbers(5, 300)
    assert torch.equal(packed.matmul(x, dtype=torch.bfloat16), packed.matmul(x).bfloat16())


def test_what_is_not_finite_reaches_its_row_alone(library: Library) -> None:
    packed = PackedDense(library, numbers(64, 40).bfloat16())
    x = numbers(3, 40)
    clean = packed.matmul(x)
    x[1, 5] = torch.nan
    got = packed.matmul(x)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_can_be_read_back(library: Library, dtype: torch.dtype) -> None:
    weight = numbers(70, 33).to(dtype)
    packed = PackedDense(library, weight)
    assert torch.equal(packed.dequantize(), weight.float())
    rows = torch.tensor([69, 0, 3, 3])
    assert torch.equal(packed.gather(rows), weight[rows])


def test_no_rows_give_no_results(library: Library) -> None:
    assert PackedDense(library, numbers(64, 8)).matmul(torch.empty(0, 8)).shape == (0, 64)
