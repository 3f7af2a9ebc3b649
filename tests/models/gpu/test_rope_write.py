"""Rotation of heads and writes to the KV blocks, alone and in one kernel, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm_models.gpu import kv_write, rms_norm, rope_write

NUM_BLOCKS, BLOCK_SIZE = 5, 8
POOLS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
Side = tuple[Tensor, Tensor | None]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds no numbers."""
    monkeypatch.setattr(rope_write.torch, "empty", poisoned)


def poisoned(*shape: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(*shape, torch.nan, dtype=dtype, device=device)


def angles(num_tokens: int, turned: int, interleaved: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine [T, 1, R]."""
    angle = noise(num_tokens, 1, turned // 2) * 3
    cos, sin = (angle.cos(), angle.cos()), (-angle.sin(), angle.sin())
    if interleaved:
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in (cos, sin))
    else:
        cos, sin = (torch.cat(pair, -1) for pair in (cos, sin))
    return cos.to(like), sin.to(like)


def pool(num_heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Side:
    """A side of the KV of which nothing was written."""
    data = torch.full((NUM_BLOCKS, num_heads, BLOCK_SIZE, dim), 77.0, device=device).to(dtype)
    has_scales = dtype in kv_write.LIMITS
    return data, torch.full(data.shape[:3], torch.nan, device=device) if has_scales else None


def slots_of(num_tokens: int, device: torch.device) -> Tensor:
    order = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(3))
    return order[:num_tokens].to(device)


def check_side(got: Side, wanted: Side) -> None:
    """Equal but for one step of a type's numbers; what was not written is untouched."""
    data, expected = got[0].float(), wanted[0].float()
    absolute, relative = {torch.int8: (1.0, 0.0), torch.float8_e4m3fn: (0.02, 0.13)}.get(
        got[0].dtype, (1e-5, 1e-2)
    )
    is_near = (data - expected).abs() <= absolute + relative * expected.abs()
    # Triton's interpreter loses the carry when it rounds to float8: half of some numbers.
    is_cut = got[0].dtype == torch.float8_e4m3fn and not data.is_cuda
    assert is_near.float().mean() > 0.98 if is_cut else is_near.all()
    if got[1] is not None and wanted[1] is not None:
        torch.testing.assert_close(got[1], wanted[1], atol=0, rtol=2e-2, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 5, 24, 16), (2, 3, 80, 20), (2, 2, 128, 128)])
def test_rope(
    device: torch.device, shape: tuple[int, int, int, int], interleaved: bool, dtype: torch.dtype
) -> None:
    num_tokens, num_heads, dim, turned = shape
    x = noise(num_tokens, num_heads, dim).to(device, dtype)
    weight, tolerance = noise(dim).to(x), 1e-5 if dtype == torch.float32 else 3e-2
    cos, sin = angles(num_tokens, turned, interleaved, x)
    for norm in (None, (weight, 1e-6, 0.0), (weight, 1e-6, 1.0)):
        got = rope_write.rope(x, cos, sin, interleaved, norm)
        wanted = rope_write.reference(x, cos, sin, interleaved, norm)
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
        if norm is None:
            assert torch.equal(got[..., turned:], x[..., turned:])


def test_rope_of_heads_between_others(device: torch.device) -> None:
    qkv = noise(4, 7, 16).to(device)
    cos, sin = angles(4, 16, False, qkv)
    for heads in (qkv[:, 2:5], qkv[:, :, :16:1][:, 6:], qkv.transpose(0, 1)[:4, :3]):
        got = rope_write.rope(heads, cos, sin)
        torch.testing.assert_close(got, rope_write.reference(heads, cos, sin))


@pytest.mark.parametrize("dtype", POOLS)
@pytest.mark.parametrize("shape", [(3, 1, 24, None), (5, 3, 16, 40), (2, 2, 576, 512)])
def test_kv_write(
    device: torch.device, shape: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    num_tokens, num_heads, dim, value_dim = shape
    wide = noise(num_tokens, num_heads + 1, dim).to(device)
    key = wide[:, 1:] if num_heads > 1 else wide[:, :1]
    value = None if value_dim is None else noise(num_tokens, num_heads, value_dim).to(device) * 9
    slots = slots_of(num_tokens, device)
    got, wanted = (
        (pool(num_heads, dim, dtype, device), pool(num_heads, value_dim or dim, dtype, device))
        for _ in range(2)
    )
    kv_write.kv_write(key, value, *got[0], *got[1], slots)
    kv_write.reference(key, value, *wanted[0], *wanted[1], slots)
    for side, expected in zip(got, wanted, strict=True):
        check_side(side, expected)
    if dtype == torch.float32:
        assert torch.equal(got[0][0], wanted[0][0]) and torch.equal(got[1][0], wanted[1][0])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_stored_in_eight_bits_is_near_what_was_written(
    device: torch.device, dtype: torch.dtype
) -> None:
    sizes = torch.tensor([1e-3, 1.0, 50.0, 3e4, 1e-20, 7.0])
    key = (noise(6, 2, 32) * sizes.view(6, 1, 1)).to(device)
    keys, scales = pool(2, 32, dtype, device)
    slots = slots_of(6, device)
    kv_write.kv_write(key, None, keys, scales, None, None, slots)
    assert scales is not None
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    restored = keys[block, :, offset].float() * scales[block, :, offset][..., None]
    largest = key.abs().amax(-1, keepdim=True)
    if dtype == torch.int8:
        assert ((restored - key).abs() <= largest / 250).all()
    else:  # three bits behind the point; see `check_side`
        is_near = (restored - key).abs() <= key.abs() / 15 + largest / 1e5
        assert is_near.float().mean() >= (1.0 if device.type == "cuda" else 0.9)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_zeros_are_stored_as_zeros(device: torch.device, dtype: torch.dtype) -> None:
    key = torch.zeros(2, 2, 16, device=device)
    key[1] = 1e-42  # too small for an inverse
    keys, scales = pool(2, 16, dtype, device)
    slots = torch.tensor([3, 9], device=device)
    kv_write.kv_write(key, None, keys, scales, None, None, slots)
    assert scales is not None
    assert not keys[0, :, 3].float().any() and not keys[1, :, 1].float().any()
    assert torch.equal(scales[0, :, 3], torch.zeros(2, device=device))
    assert scales[1, :, 1].isfinite().all()


def alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor, bool],
    norms: tuple[rope_write.Norm | None, rope_write.Norm | None],
    keys: Side,
    values: Side,
    slots: Tensor,
) -> Tensor:
    """`rope_write` by one kernel for each part."""
    q, k = (
        rope_write.rope(x if norm is None else rms_norm.rms_norm(x, *norm), *rotation)
        for x, norm in zip((q, k), norms, strict=True)
    )
    kv_write.kv_write(k, v, *keys, *values, slots)
    return q


SHAPES = {
    "one-token": (1, 2, 1, 16, 16),
    "many-heads": (3, 20, 5, 64, 64),
    "part-of-each-head": (4, 6, 2, 48, 24),
    "odd": (2, 3, 3, 20, 12),
    "wide": (2, 4, 2, 256, 256),
}


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.int8),
        (torch.float32, torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "normed", "interleaved"])
def test_one_kernel_does_what_three_do(
    device: torch.device,
    kind: str,
    name: str,
    dtype: torch.dtype,
    pool_dtype: torch.dtype,
) -> None:
    num_tokens, num_heads, num_kv_heads, dim, turned = SHAPES[name]
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = noise(num_tokens, sum(heads), dim).to(device, dtype).split(heads, dim=1)
    rotation = (*angles(num_tokens, turned, kind == "interleaved", q), kind == "interleaved")
    norms = (None, None)
    if kind != "plain":
        norms = tuple((noise(dim, seed=i).to(q), 1e-6, 1.0) for i in range(2))
    slots = slots_of(num_tokens, device)
    sides = [tuple(pool(num_kv_heads, dim, pool_dtype, device) for _ in range(2)) for _ in range(2)]
    got = rope_write.rope_write(q, k, v, rotation, norms, *sides[0], slots)
    wanted = alone(q, k, v, rotation, norms, *sides[1], slots)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    for side, expected in zip(*sides, strict=True):
        check_side(side, expected)


def test_values_may_be_narrower_than_keys(device: torch.device) -> None:
    q, k, v = noise(3, 4, 24), noise(3, 2, 24), noise(3, 2, 10)
    q, k, v = (x.to(device) for x in (q, k, v))
    rotation = (*angles(3, 24, False, q), False)
    slots = slots_of(3, device)
    sides = [
        (pool(2, 24, torch.float32, device), pool(2, 10, torch.float32, device)) for _ in range(2)
    ]
    got = rope_write.rope_write(q, k, v, rotation, (None, None), *sides[0], slots)
    assert torch.equal(got, alone(q, k, v, rotation, (None, None), *sides[1], slots))
    for side, expected in zip(*sides, strict=True):
        assert torch.equal(side[0], expected[0])


def test_a_token_does_not_depend_on_the_others(device: torch.device) -> None:
    q, k, v = (noise(6, heads, 32, seed=heads).to(device) for heads in (4, 2, 2))
    cos, sin = angles(6, 32, False, q)
    norms = ((noise(32).to(device), 1e-6, 0.0),) * 2
    slots = slots_of(6, device)
    kv = [pool(2, 32, torch.int8, device) for _ in range(4)]
    together = rope_write.rope_write(q, k, v, (cos, sin, False), norms, *kv[:2], slots)
    for t in range(6):
        one = slice(t, t + 1)
        got = rope_write.rope_write(
            q[one], k[one], v[one], (cos[one], sin[one], False), norms, *kv[2:], slots[one]
        )
        assert torch.equal(got[0], together[t])
    assert torch.equal(kv[0][0], kv[2][0]) and torch.equal(kv[1][0], kv[3][0])
