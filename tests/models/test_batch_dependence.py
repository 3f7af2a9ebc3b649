"""What a backend knows about itself: whether results depend on the batch, how fast its kernels are,
and what its steps cost.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, TorchBackend, load_backend
from vllm_models.native.library import library
from vllm_traits import BackendError, Batch, Chunk, Request, SamplingParams, Start, StepCost

native = pytest.mark.skipif(library() is None, reason="there is no C compiler")


def load(folder: Any, **options: Any) -> TorchBackend:
    fields = {"dtype": "f32", "device": "cpu", "num_blocks": 32, "threads": 1}
    return load_backend(BackendOptions(folder, **(fields | options)))


@native
@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"isq": "q4_0"}, {"block_size": 32}])
def test_kernels_everywhere_leave_nothing_to_the_batch(
    make_checkpoint: Any, options: dict[str, Any]
) -> None:
    backend = load(make_checkpoint("qwen3").folder, **options)
    assert backend.loaded.batch_dependence == ()


@native
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("qwen3", {"block_size": 24}, ["attention runs in torch: KV is float32 in blocks of 24"]),
        ("qwen3", {"dtype": "f16"}, ["products run in torch", "Dense in float16", "attention"]),
        ("deepseek_v3", {}, ["kv_b_proj", "attention runs in torch"]),
    ],
)
def test_whatever_torch_computes_is_named(
    make_checkpoint: Any, family: str, options: dict[str, Any], words: list[str]
) -> None:
    reasons = "; ".join(load(make_checkpoint(family).folder, **options).loaded.batch_dependence)
    for part in words:
        assert part in reasons


def test_without_kernels_the_reason_is_that(make_checkpoint: Any, torch_products: None) -> None:
    backend = load(make_checkpoint("qwen3").folder)
    assert backend.loaded.batch_dependence == (
        "torch computes, because there are no native kernels",
    )
    assert backend.measure_kernels() is None


@native
def test_kernels_are_measured_by_kind(make_checkpoint: Any) -> None:
    speed = load(make_checkpoint("qwen3").folder, isq="q4_0").measure_kernels()
    assert speed is not None
    assert speed.read_bandwidth > 1e8
    assert "blocks" in speed.shares
    assert all(share > 0 for share in speed.shares.values())
    backend = load(make_checkpoint("qwen3").folder)
    plain = backend.measure_kernels()
    assert plain is not None
    assert set(plain.shares) == {"dense"}
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.measure_kernels()


def cost(backend: TorchBackend, *chunks: Chunk, **batch: Any) -> StepCost:
    found = backend.forward(Batch(chunks, **batch)).result().cost
    assert found is not None
    return found


def test_a_step_costs_its_weights_its_kv_and_its_logits(
    make_checkpoint: Any, torch_products: None
) -> None:
    """By hand, for 8 tokens and then one."""
    checkpoint = make_checkpoint("llama", tie_word_embeddings=False)
    backend, c = load(checkpoint.folder), checkpoint.model.config
    layers = {n: m for n, m in checkpoint.model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = layers.pop("lm_head").weight.nbytes
    weights = sum(m.weight.nbytes for m in layers.values())
    numbers = sum(m.weight.numel() for m in layers.values())
    per_position = c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim * 4
    pair = 4 * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    start = Start(5, tuple(range(3, 11)), SamplingParams(temperature=0.0), num_prompt_tokens=8)
    prompt = cost(backend, Chunk(5, 0, 8, (0,), sample=False), starts=(start,))
    assert prompt.bytes_moved == weights + (8 + 8) * per_position
    assert prompt.flops == 8 * 2 * numbers + pair * (1 + 8) * 8 // 2
    assert prompt.device_seconds > 0
    backend.forward(Batch((), released=(5,)))
    whole = cost(backend, Chunk(6, 0, 8, (0,)), starts=(start._replace(seq_id=6),))
    assert whole.bytes_moved - prompt.bytes_moved == head + 4 * c.vocab_size
    decode = cost(backend, Chunk(6, 8, 1))
    assert decode.bytes_moved == weights + head + (9 + 1) * per_position + 4 * c.vocab_size
    assert decode.flops == 2 * numbers + 2 * c.vocab_size * c.hidden_size + pair * 9


def test_tied_embeddings_are_read_once_and_experts_as_many_as_tokens_choose(
    make_checkpoint: Any, torch_products: None
) -> None:
    tied = load(make_checkpoint("qwen3", tie_word_embeddings=True).folder)
    parted = load(make_checkpoint("qwen3", tie_word_embeddings=False).folder)
    start = Start(5, (3,), SamplingParams(temperature=0.0), num_prompt_tokens=1)
    step = ((Chunk(5, 0, 1, (0,)),), (start,))
    costs = [b.forward(Batch(*step)).result().cost for b in (tied, parted)]
    assert costs[0].bytes_moved == costs[1].bytes_moved  # pyright: ignore[reportOptionalMemberAccess]
    sparse = load(make_checkpoint("qwen3_moe").folder)
    one = cost(sparse, Chunk(5, 0, 1, (0,), sample=False), starts=(start,))
    many = start._replace(seq_id=6, token_ids=tuple(range(3, 23)), num_prompt_tokens=20)
    all_of_them = cost(sparse, Chunk(6, 0, 20, (1, 2), sample=False), starts=(many,))
    experts = [m for n, m in sparse_experts(sparse)]
    kv = (1 + 1, 20 + 20)
    per_position = sparse.memory.bytes_per_block // sparse.memory.block_size
    dense = all_of_them.bytes_moved - sum(experts) - kv[1] * per_position
    assert 0 < one.bytes_moved - dense - kv[0] * per_position < sum(experts)


def sparse_experts(backend: TorchBackend) -> list[tuple[str, int]]:
    model = backend._runner.model  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
    return [(n, p.nbytes) for n, p in model.named_parameters() if ".experts." in n]


def test_the_engine_adds_costs_up(make_checkpoint: Any) -> None:
    engine = Engine(load(make_checkpoint("qwen3").folder), SchedulerConfig())
    prompt = tuple(random.Random(1).choices(range(3, 100), k=20))
    engine.add(Request("r", prompt, SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_work():
        engine.step()
    stats = engine.stats
    assert stats.cost_bytes > 0
    assert stats.cost_flops > 0
    assert stats.device_seconds > 0
