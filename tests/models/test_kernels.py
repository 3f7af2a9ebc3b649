"""Every operator against the textbook form beside it."""

from __future__ import annotations

import importlib
import pkgutil
import random

import pytest
import torch
from vllm_models import kernels
from vllm_models.kernels import (
    clamped_swiglu,
    gelu_mul,
    kv_write,
    paged_attention,
    rms_norm,
    rope,
    rope_write,
    silu_mul,
)
from vllm_models.kernels.kv_side import KVSide
from vllm_models.kernels.paged_attention import Span, prepare

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def test_every_operator_has_its_reference_beside_it() -> None:
    names = {module.name for module in pkgutil.iter_modules(kernels.__path__)} - {"kv_side"}
    assert len(names) >= 5
    for name in names:
        module = importlib.import_module(f"vllm_models.kernels.{name}")
        assert callable(module.reference) and callable(getattr(module, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (3, 4, 16), (300, 7)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = noise(*shape, dtype=dtype), noise(shape[-1], dtype=dtype)
    for factors, offset in ((weight, 0.0), (weight, 1.0), (None, 0.0)):
        got = rms_norm.rms_norm(x, factors, 1e-6, offset)
        wanted = rms_norm.reference(x, factors, 1e-6, offset)
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_of_a_sum_is_that_of_the_rounded_sum(dtype: torch.dtype, offset: float) -> None:
    x, residual, weight = (noise(*shape, dtype=dtype) for shape in ((5, 48), (6, 48), (48,)))
    total, normed = rms_norm.add_rms_norm(x, residual[1:], weight, 1e-6, offset)
    assert torch.equal(total, residual[1:] + x)
    assert torch.equal(normed, rms_norm.rms_norm(total, weight, 1e-6, offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (7, 160), (64, 50)])
def test_gated_activations(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, tolerance = noise(*shape, dtype=dtype) * 2, DTYPES[dtype]
    for module, limits in ((silu_mul, ()), (gelu_mul, ()), (clamped_swiglu, (1.702, 3.0))):
        got = getattr(module, module.__name__.rpartition(".")[2])(x, *limits)
        wanted = module.reference(x, *limits)
        torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1, 4), (9, 4, 16), (3, 1, 128)])
def test_rope(shape: tuple[int, int, int], turned: float, interleaved: bool) -> None:
    x, angles = noise(*shape), noise(shape[0], 1, int(shape[2] * turned) // 2)
    cos, sin = [angles.cos()] * 2, [-angles.sin(), angles.sin()]
    if interleaved:
        cos, sin = (torch.stack(pair, -1).flatten(-2) for pair in (cos, sin))
    else:
        cos, sin = (torch.cat(pair, -1) for pair in (cos, sin))
    got, wanted = (f(x, cos, sin, interleaved) for f in (rope.rope, rope.reference))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[..., cos.shape[-1] :], x[..., cos.shape[-1] :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_heads_are_normalised_before_they_are_rotated(dtype: torch.dtype, offset: float) -> None:
    x, angles = noise(5, 3, 16, dtype=dtype), noise(5, 1, 8)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norm = rms_norm.Norm(noise(16, dtype=dtype), 1e-6, offset)
    got = rope.rope(x, cos.to(dtype), sin.to(dtype), norm=norm)
    wanted = rope.reference(rms_norm.reference(x, *norm), cos.to(dtype), sin.to(dtype))
    torch.testing.assert_close(got, wanted, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rope_write(offset: float | None) -> None:
    q, k, v = noise(5, 8, 16).split((4, 2, 2), dim=1)
    angles = noise(5, 1, 8)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    norms = tuple(
        None if offset is None else rms_norm.Norm(noise(16), eps, offset) for eps in (1e-6, 0.1)
    )
    pools = [KVSide(torch.zeros(6, 4, 2, 16)) for _ in range(4)]
    slots = torch.tensor([23, 0, 7, 8, 13])
    got = rope_write.rope_write(q, k, v, (cos, sin, False), norms, *pools[:2], slots)
    wanted = rope_write.reference(q, k, v, (cos, sin, False), norms, *pools[2:], slots)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(pools[0], pools[2])
    assert torch.equal(pools[1].data, pools[3].data)
    assert not torch.equal(got, q)


def side_of(*shape: int, dtype: torch.dtype = torch.float32) -> KVSide:
    """Zeros, with scales if they are int8."""
    data = torch.zeros(shape, dtype=dtype)
    return KVSide(data, torch.zeros(shape[:3]) if dtype == torch.int8 else None)


def test_kv_write_in_int8() -> None:
    pools = [side_of(6, 4, 2, 8, dtype=torch.int8) for _ in range(4)]
    key, value = noise(5, 2, 8) * 30, noise(5, 2, 8) + 1
    key[1] = 0.0
    slots = torch.tensor([23, 0, 7, 8, 13])
    kv_write.kv_write(key, value, pools[0], pools[1], slots)
    kv_write.reference(key, value, pools[2], pools[3], slots)
    for got, wanted in ((pools[0], pools[2]), (pools[1], pools[3])):
        assert torch.equal(got.data, wanted.data) and torch.equal(got.scales, wanted.scales)
    stored = pools[0].dequantized(torch.arange(6), torch.float32).flatten(0, 1)[slots]
    assert ((stored - key).abs() <= key.abs().amax(-1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("name", ["decodes", "mixed"])
def test_paged_attention_over_int8(name: str) -> None:
    tables = torch.tensor(random.Random(1).sample(range(80), k=5 * 8)).view(5, 8)
    spans = [Span(row, *span) for row, span in enumerate(SPANS[name])]
    q = noise(sum(span.num_queries for span in spans), 4, 16)
    keys, values = (side_of(80, 4, 2, 16, dtype=torch.int8) for _ in range(2))
    kv_write.kv_write(noise(320, 2, 16), noise(320, 2, 16) + 1, keys, values, torch.arange(320))
    prepared = prepare(spans, tables, 4, q.dtype, 7)
    got = paged_attention.paged_attention(q, keys, values, prepared, 0.25)
    wanted = paged_attention.reference(q, keys, values, spans, tables, 0.25, 7)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_kv_write() -> None:
    pools = [KVSide(torch.zeros(6, 4, 2, 8)) for _ in range(4)]
    key, value = noise(5, 2, 8), noise(5, 2, 8) + 1
    slots = torch.tensor([23, 0, 7, 8, 13])
    kv_write.kv_write(key, value, pools[0], pools[1], slots)
    kv_write.reference(key, value, pools[2], pools[3], slots)
    assert torch.equal(pools[0].data, pools[2].data)
    assert torch.equal(pools[1].data, pools[3].data)


def test_a_layer_without_values_writes_its_keys_once() -> None:
    pools = [KVSide(torch.zeros(6, 4, 1, 8)) for _ in range(2)]
    key, slots = noise(3, 1, 8), torch.tensor([23, 0, 7])
    kv_write.kv_write(key, None, pools[0], pools[0], slots)
    kv_write.reference(key, None, pools[1], pools[1], slots)
    assert torch.equal(pools[0].data, pools[1].data)
    assert torch.equal(pools[0].data.flatten(0, 1)[23], key[0])


SPANS = {
    "one-decode": [(1, 9)],
    "decodes": [(1, 1), (1, 30), (1, 17), (1, 16)],
    "drafts": [(3, 12), (1, 4), (4, 4)],
    "whole-prompt": [(19, 19)],
    "later-chunk": [(8, 27)],
    "mixed": [(1, 20), (6, 6), (2, 31), (10, 25), (1, 3)],
    "prompts": [(5, 5), (31, 31), (7, 12)],
}


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("group_positions", [8192, 48, 1])
@pytest.mark.parametrize("window", [0, 1, 7, 40])
@pytest.mark.parametrize("name", SPANS)
def test_paged_attention(
    name: str,
    window: int,
    heads: tuple[int, int],
    group_positions: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_attention, "GROUP_POSITIONS", group_positions)
    num_heads, num_kv_heads = heads
    block_size, num_blocks = 4, 80
    tables = torch.tensor(random.Random(1).sample(range(num_blocks), k=5 * 8)).view(5, 8)
    spans = [Span(row, *span) for row, span in enumerate(SPANS[name])]
    q = noise(sum(span.num_queries for span in spans), num_heads, 16)
    keys, values = (KVSide(noise(num_blocks, block_size, num_kv_heads, 16) + i) for i in range(2))
    prepared = prepare(spans, tables, block_size, q.dtype, window)
    got = paged_attention.paged_attention(q, keys, values, prepared, 0.25)
    wanted = paged_attention.reference(q, keys, values, spans, tables, 0.25, window)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("widths", [(16, 16), (24, 8), (64, 64), (256, 256), (576, 512)])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", ["decodes", "drafts", "mixed", "prompts"])
def test_paged_attention_with_odd_scores_and_widths(
    name: str,
    has_sinks: bool,
    soft_cap: float,
    window: int,
    widths: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_attention, "MAX_SCORES", 4 * 30)
    tables = torch.tensor(random.Random(2).sample(range(60), k=5 * 8)).view(5, 8)
    spans = [Span(row, *span) for row, span in enumerate(SPANS[name])]
    q = noise(sum(span.num_queries for span in spans), 4, widths[0])
    keys, values = (KVSide(noise(60, 4, 2, width)) for width in widths)
    sinks = noise(4) + 1 if has_sinks else None
    scale = widths[0] ** -0.5 * 2
    prepared = prepare(spans, tables, 4, q.dtype, window)
    got = paged_attention.paged_attention(q, keys, values, prepared, scale, soft_cap, sinks)
    wanted = paged_attention.reference(
        q, keys, values, spans, tables, scale, window, soft_cap, sinks
    )
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_queries_of_long_contexts_are_gathered_in_bounded_groups() -> None:
    tables = torch.zeros(300, 64, dtype=torch.int64)
    spans = [Span(row, 1, 1000 if row < 10 else 20) for row in range(300)]
    prepared = prepare(spans, tables, 16, torch.float32)
    sizes = [group.mask.numel() for group in prepared.groups]
    assert max(sizes) <= paged_attention.GROUP_POSITIONS
    assert sum(sizes) < 10 * 1008 + 290 * 32 + 8 * 1008
