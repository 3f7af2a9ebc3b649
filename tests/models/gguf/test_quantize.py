"""Blocks made from weights: their error against that of the reference quantizer, and extremes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.gguf.types import GgmlType, row_bytes

LIMIT = 1.05
# Root-mean-square errors of llama.cpp: `ggml_quantize_chunk` without importance weights (libggml
# of llama-cpp-python 0.3.36) on `weights(distribution)`, dequantized by the `gguf` package.
DISTRIBUTIONS = ("gaussian", "student3", "student4", "student5")
REFERENCE = {
    "Q2_K": (5.9283e-03, 1.1980e-02, 9.7439e-03, 8.6358e-03),
    "Q3_K": (3.0197e-03, 6.4724e-03, 5.1915e-03, 4.5579e-03),
    "Q4_K": (1.4269e-03, 3.1623e-03, 2.4509e-03, 2.1461e-03),
    "Q5_K": (7.2199e-04, 1.6024e-03, 1.2385e-03, 1.0854e-03),
    "Q6_K": (3.5430e-04, 8.7012e-04, 6.4508e-04, 5.5484e-04),
    "Q8_0": (1.0671e-04, 2.8741e-04, 2.0648e-04, 1.7498e-04),
    "Q4_0": (1.7174e-03, 4.3764e-03, 3.2712e-03, 2.7908e-03),
    "Q4_1": (1.5647e-03, 3.4305e-03, 2.6483e-03, 2.3208e-03),
    "Q5_0": (8.5220e-04, 2.2534e-03, 1.6388e-03, 1.3925e-03),
    "Q5_1": (7.5649e-04, 1.6526e-03, 1.2812e-03, 1.1238e-03),
}
TYPES = tuple(GgmlType[name] for name in REFERENCE)


def weights(distribution: str, rows: int = 256, columns: int = 1024) -> np.ndarray:
    """Always the same numbers: the streams of `RandomState` never change."""
    random = np.random.RandomState(7)
    if distribution == "gaussian":
        drawn = random.standard_normal((rows, columns))
    else:
        drawn = random.standard_t(int(distribution[-1]), (rows, columns))
    return (drawn * 0.02).astype(np.float32)


def there_and_back(weight: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    """Read by the `gguf` package, so that the layout is checked as well."""
    blocks = quantize(weight, kind)
    assert blocks.shape == (len(weight), row_bytes(kind, weight.shape[1]))
    found = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType(int(kind)))
    return torch.from_numpy(found.reshape(weight.shape))


def error(weight: torch.Tensor, kind: GgmlType) -> float:
    return float((there_and_back(weight, kind) - weight).double().square().mean().sqrt())


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_errors_are_about_those_of_the_reference(kind: GgmlType, distribution: str) -> None:
    weight = torch.from_numpy(weights(distribution))
    reference = REFERENCE[kind.name][DISTRIBUTIONS.index(distribution)]
    assert error(weight, kind) <= LIMIT * reference


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_zeros_stay_zeros(kind: GgmlType) -> None:
    weight = torch.zeros(3, 512)
    assert torch.equal(there_and_back(weight, kind), weight)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [0.25, -0.25, 3.0, -0.01])
def test_constants_are_met_closely(kind: GgmlType, value: float) -> None:
    found = there_and_back(torch.full((2, 512), value), kind)
    assert (found / value - 1).abs().max() < 0.01


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1e-10])
def test_what_is_too_small_for_half_floats_becomes_zero(kind: GgmlType, size: float) -> None:
    found = there_and_back(torch.randn(2, 512) * size, kind)
    assert torch.equal(found, torch.zeros(2, 512))


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [1e8, 1e20, 3e38])
def test_what_is_too_large_for_half_floats_keeps_its_sign(kind: GgmlType, size: float) -> None:
    weight = torch.where(torch.arange(1024).view(2, 512) % 2 == 0, size, -size)
    found = there_and_back(weight, kind)
    assert torch.isfinite(found).all()
    assert (found.sign() == weight.sign()).all()


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_an_outlier_is_met_and_hurts_its_own_block_only(kind: GgmlType) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 1024) * 0.01
    usual = there_and_back(weight, kind)
    weight[0, 300] = 5.0
    found = there_and_back(weight, kind)
    assert abs(found[0, 300] - 5.0) < 0.1
    elsewhere = torch.cat([torch.arange(256), torch.arange(512, 1024)])
    assert torch.equal(found[0, elsewhere], usual[0, elsewhere])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [GgmlType.Q4_K, GgmlType.Q8_0], ids=lambda kind: kind.name)
def test_what_is_no_number_is_refused(kind: GgmlType, value: float) -> None:
    weight = torch.zeros(3, 256)
    weight[1, 7] = value
    with pytest.raises(ValueError, match="infinite or not a number"):
        quantize(weight, kind)


def test_rows_must_be_whole_blocks() -> None:
    with pytest.raises(ValueError, match="320"):
        quantize(torch.zeros(2, 320), GgmlType.Q4_K)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(kind: GgmlType) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2200, 1024)
    alone = quantize(weight[1234:1237], kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = quantize(weight, kind)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together[1234:1237], alone)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (GgmlType.F32, torch.float32),
        (GgmlType.F16, torch.float16),
        (GgmlType.BF16, torch.bfloat16),
    ],
)
def test_floats_are_cast(kind: GgmlType, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 40)
    assert torch.equal(quantize(weight, kind).view(dtype), weight.to(dtype))


def test_weights_may_be_of_any_float_type() -> None:
    weight = torch.randn(4, 256).bfloat16()
    assert torch.equal(quantize(weight, GgmlType.Q4_K), quantize(weight.float(), GgmlType.Q4_K))
