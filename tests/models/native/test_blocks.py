"""Quantized weights: every format on every instruction-set class against the textbook form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_models.gguf.types import GgmlType, block_bytes, block_size
from vllm_models.native.blocks import (
    BLOCK_TYPES,
    PackedBlocks,
    pack_blocks,
    pack_grouped,
    reference,
    round_activations,
    stack,
)
from vllm_models.native.library import Library, load
from vllm_models.native.processor import InstructionSet, runnable
from vllm_models.quantization.grouped import pack_codes

ROWS = (1, 2, 3, 7, 16, 17, 33, 65, 200)  # 200 is more than a kernel keeps sums of
# Where a block has its 16-bit scales: random bytes there would be infinite or nothing.
SCALES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}


@pytest.fixture(params=runnable(), scope="module")
def library(request: pytest.FixtureRequest) -> Library:
    return load(InstructionSet(request.param))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uneven(*shape: int) -> Tensor:
    """Numbers some of whose columns are thousands of times as large as others."""
    return numbers(*shape) * 2.0 ** (numbers(shape[-1], seed=1) * 3).round()


def random_blocks(kind: str, outputs: int, per_row: int) -> Tensor:
    """Blocks of random codes with scales of the usual size: [outputs, bytes]."""
    random = torch.Generator().manual_seed(BLOCK_TYPES[kind])
    shape = (outputs, per_row, block_bytes(GgmlType[kind]))
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    for place in SCALES.get(kind, ()):
        scale = torch.randn((outputs, per_row, 1), generator=random) * 0.01
        blocks[:, :, place : place + 2] = scale.half().view(torch.uint8)
    if kind == "MXFP4":
        blocks[:, :, 0] = torch.randint(115, 125, shape[:2], generator=random)
        blocks[0, 0, 0], blocks[0, 1 % per_row, 0] = 0, 1  # below the normal range of floats
    return blocks.flatten(1)


def packed_of(library: Library, kind: str, outputs: int, per_row: int) -> PackedBlocks:
    columns = per_row * block_size(GgmlType[kind])
    return pack_blocks(library, random_blocks(kind, outputs, per_row), kind, columns)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("outputs", "per_row"), [(1, 1), (33, 3), (130, 2)])
def test_dequantized_weights_are_those_of_the_format(
    library: Library, kind: str, outputs: int, per_row: int
) -> None:
    quants = pytest.importorskip("gguf.quants")
    blocks = random_blocks(kind, outputs, per_row)
    want = torch.from_numpy(quants.dequantize(blocks.numpy(), BLOCK_TYPES[kind]))
    packed = pack_blocks(library, blocks, kind, want.shape[1])
    assert torch.equal(packed.dequantize(), want)
    rows = torch.tensor([outputs - 1, 0])
    assert torch.equal(packed.gather(rows), want[rows])


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("outputs", "per_row"), [(1, 1), (33, 3), (130, 2)])
def test_products_are_those_of_the_reference(
    library: Library, kind: str, outputs: int, per_row: int
) -> None:
    packed = packed_of(library, kind, outputs, per_row)
    x = numbers(max(ROWS), packed.columns)
    want = reference(packed, x)
    got = packed.matmul(x, out=torch.full((len(x), outputs), torch.nan))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6 * want.abs().max().item())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_row_has_the_same_bits_in_every_batch_and_with_any_number_of_threads(
    library: Library, kind: str
) -> None:
    packed = packed_of(library, kind, 130, 3)
    x = uneven(max(ROWS), packed.columns).bfloat16()
    whole = packed.matmul(x)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in ROWS:
                assert torch.equal(packed.matmul(x[-rows:]), whole[-rows:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("columns", "groups"), [(96, 3), (192, 3), (256, 2), (384, 1), (1024, 2), (100, 1), (40, 1)]
)
def test_grouped_codes_are_multiplied_as_scale_times_code_less_zero(
    library: Library, bits: int, dtype: torch.dtype, columns: int, groups: int
) -> None:
    random = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (70, columns), dtype=torch.uint8, generator=random)
    scales = (torch.rand((70, groups), generator=random) * 0.02).to(dtype)
    zeros = torch.randint(0, 2**bits, (70, groups), generator=random)
    packed = pack_grouped(library, pack_codes(codes, bits), scales, zeros, bits)
    spread = lambda t: t.float().repeat_interleave(-(-columns // groups), 1)[:, :columns]  # noqa: E731
    torch.testing.assert_close(packed.dequantize(), spread(scales) * (codes - spread(zeros)))
    x = numbers(9, columns)
    want = reference(packed, x)
    got = packed.matmul(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6 * want.abs().max().item())
    assert torch.equal(packed.matmul(x[:1]), got[:1])


def test_stacked_weights_of_several_formats_stand_side_by_side(library: Library) -> None:
    parts = [packed_of(library, kind, 70, 2) for kind in ("Q4_K", "Q6_K", "Q2_K")]
    together, bias = stack(parts), numbers(210, seed=5)
    assert (together.outputs, together.columns) == (210, 512)
    assert together.nbytes == sum(part.nbytes for part in parts)
    for rows in (1, 5):
        x = numbers(rows, 512)
        want = torch.cat([part.matmul(x) for part in parts], 1) + bias
        assert torch.equal(together.matmul(x, bias), want)
    assert torch.equal(together.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_activations_and_results_of_both_types_with_rows_apart(library: Library) -> None:
    packed = packed_of(library, "Q4_K", 70, 1)
    x = numbers(4, 260)[:, 2:258]
    room = torch.full((4, 90), 7.0, dtype=torch.bfloat16)
    packed.matmul(x, out=room[:, 10:80])
    assert torch.equal(room[:, 10:80], packed.matmul(x.contiguous()).bfloat16())
    assert (room[:, :10] == 7).all() and (room[:, 80:] == 7).all()
    short = x.bfloat16()
    assert torch.equal(packed.matmul(short, dtype=torch.float32), packed.matmul(short.float()))


def test_quantized_activations_are_near_and_keep_zeros_and_extremes() -> None:
    x = numbers(3, 70)
    x[1] = 0
    x[2, 40] = 1000
    rounded = round_activations(x)
    assert (rounded[1] == 0).all()
    assert rounded[2, 40] == 1000
    steps = torch.nn.functional.pad(x, (0, 26)).unflatten(1, (-1, 32)).abs().amax(-1) / 127
    steps[2, [0, 2]] *= 2  # powers of two of the step of the largest
    steps[0] = steps[0].amax()
    near = steps.repeat_interleave(32, 1)[:, :70] * 0.5001
    assert ((rounded - x).abs() <= near).all()


def test_small_activations_beside_large_ones_keep_their_precision() -> None:
    x = uneven(40, 768)
    steps = x.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    near = steps.expand(40, 24, 32).flatten(1) * 1.0001
    assert ((round_activations(x) - x).abs() <= near).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_1", "Q4_K", "Q6_K"])
def test_uneven_activations_cost_no_more_than_their_rounding(library: Library, kind: str) -> None:
    packed = packed_of(library, kind, 130, 768 // block_size(GgmlType[kind]))
    x = uneven(40, 768)
    exact = x.double() @ packed.dequantize().double().T
    rounding = (reference(packed, x) - exact).norm()
    assert (packed.matmul(x).double() - exact).norm() <= 1.01 * rounding


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_row_alone(library: Library, bad: float) -> None:
    packed = packed_of(library, "Q6_K", 64, 1)
    x = numbers(3, 256)
    clean = packed.matmul(x)
    x[1, 5] = bad
    got = packed.matmul(x)
    assert not got[1].isfinite().any()
    assert torch.equal(got[::2], clean[::2])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_activations_of_any_size_are_served(library: Library, scale: float) -> None:
    packed = packed_of(library, "Q8_0", 64, 2)
    x = numbers(2, 64) * scale
    want = reference(packed, x)
    torch.testing.assert_close(
        packed.matmul(x).double(), want, rtol=1e-3, atol=1e-3 * want.abs().max().item()
    )


def test_no_rows_give_no_results(library: Library) -> None:
    assert packed_of(library, "Q4_0", 64, 1).matmul(torch.empty(0, 32)).shape == (0, 64)
