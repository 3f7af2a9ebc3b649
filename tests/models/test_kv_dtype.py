"""Keys and values in eight bits: what they take, what they change, and where they are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, TorchBackend, load_backend, resolve_model
from vllm_models.components.context import LayerKV
from vllm_models.describe import describe
from vllm_models.native.library import library
from vllm_models.runner.kv import allocate_kv, bytes_per_token, kv_dtype, kv_groups
from vllm_traits import ConfigError, ModelError, Request, SamplingParams

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(library() is None, reason="there is no C compiler")


def generate(
    backend: TorchBackend, num_tokens: int = 12, num_prompts: int = 3
) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Greedy texts of some prompts side by side, and scores of each step."""
    engine = Engine(backend, SchedulerConfig(prefix_cache=False))
    rng = random.Random(3)
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=5)
    texts: list[tuple[int, ...]] = [()] * num_prompts
    scores: list[Any] = [()] * num_prompts
    for number in range(num_prompts):
        prompt = tuple(rng.choices(range(5, 120), k=40 + 20 * number))
        engine.add(Request(str(number), prompt, params))
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output
            texts[int(output.request_id)] += output.token_ids
            scores[int(output.request_id)] += output.logprobs
    return texts, scores


def first_scores(backend: TorchBackend) -> list[float]:
    """Log-probability of the first token after each prompt."""
    return [entry[0].logprob for entry in generate(backend, 1)[1]]


@pytest.mark.parametrize(("dim", "ratio"), [(64, 0.53125), (128, 0.515625)])
def test_int8_takes_little_more_than_half_of_bf16(dim: int, ratio: float) -> None:
    layers = (LayerKV(0, 8, dim, dim),) * 3
    sizes = [bytes_per_token(layers, dtype) for dtype in (torch.int8, torch.bfloat16)]
    assert sizes[0] / sizes[1] == ratio


@pytest.mark.parametrize("stored", [torch.float32, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("block_size", [4, 16])
def test_a_group_takes_what_it_says(block_size: int, stored: torch.dtype) -> None:
    layers = (LayerKV(0, 2, 32, 16), LayerKV(8, 1, 64, 64), LayerKV(0, 2, 32, 16))
    pool = allocate_kv(layers, 5, block_size, torch.float32, CPU, stored)
    taken = sum(tensor[:, 0].nbytes for tensor in pool.tensors)
    assert taken == sum(g.bytes_per_block for g in kv_groups(layers, block_size, stored))
    assert (pool.dtype, pool.compute_dtype) == (stored, torch.float32)


def test_a_pool_of_as_many_bytes_holds_more_blocks(small: Any) -> None:
    plain, int8 = (
        small.load(num_blocks=None, kv_cache_memory=1 << 18, kv_cache_dtype=name)
        for name in ("auto", "int8")
    )
    assert int8.memory.num_blocks >= 3 * plain.memory.num_blocks  # of f32, heads of 16
    assert (int8.memory.dtype, int8.memory.kv_dtype) == ("float32", "int8")
    assert {group.dtype for group in int8.info.kv_groups} == {"int8"}
    assert plain.info.fingerprint != int8.info.fingerprint
    assert first_cost(int8) < first_cost(plain)


def first_cost(backend: TorchBackend) -> int:
    """Bytes that a step moved."""
    engine = Engine(backend, SchedulerConfig())
    engine.add(Request("a", tuple(range(5, 90)), SamplingParams(temperature=0.0, max_tokens=2)))
    while engine.has_work():
        engine.step()
    return engine.stats.cost_bytes


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_texts_of_the_embedded_model_are_those_of_its_own_type(dtype: str) -> None:
    folder = resolve_model("builtin")
    options = {"block_size": 16, "num_blocks": 64, "device": "cpu", "threads": 1}
    plain, int8 = (
        generate(load_backend(BackendOptions(folder, dtype, kv_cache_dtype=name, **options)))
        for name in ("auto", "int8")
    )
    assert plain[0] == int8[0]
    pairs = zip(sum(plain[1], ()), sum(int8[1], ()), strict=True)
    differences = [abs(one.logprob - other.logprob) for one, other in pairs]
    assert 0 < max(differences) < 0.25 and sum(differences) / len(differences) < 0.05


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {"sliding_window": 24, "attn_logit_softcapping": 5.0},
    "gemma4": {
        "sliding_window": 24,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gpt_oss": {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_torch_does(make_checkpoint: Any, family: str) -> None:
    """Windows, caps, sinks and shared layers; blocks of 4 positions are for torch."""
    saved = make_checkpoint(family, **FAMILIES[family])
    native, plain = (
        saved.load(block_size=size, kv_cache_dtype="int8", num_blocks=256) for size in (16, 4)
    )
    assert native._runner._kv.layout == "native" and plain._runner._kv.layout == "torch"
    assert first_scores(native) == pytest.approx(first_scores(plain), abs=2e-2)


@needs_kernels
def test_a_repeated_step_gives_the_bits_of_a_walk_through_the_layers(small: Any) -> None:
    repeated, walked = (
        small.load(block_size=16, kv_cache_dtype="int8", enforce_eager=eager)
        for eager in (False, True)
    )
    assert generate(repeated) == generate(walked)
    assert repeated._runner._recorded._recordings


def test_a_latent_is_not_stored_in_eight_bits() -> None:
    for name in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=r"latent vector .* use auto"):
            kv_dtype(name, (LayerKV(0, 1, 40, 0),), torch.float32, CPU)


def test_fp8_without_a_gpu_names_int8(small: Any) -> None:
    with pytest.raises(ConfigError, match=r"8\.9 and newer .* int8 takes as much"):
        small.load(kv_cache_dtype="fp8")


def test_an_unknown_type_is_refused(small: Any) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'int4', but must be one of auto"):
        small.load(kv_cache_dtype="int4")


def test_a_description_counts_what_is_stored(small: Any) -> None:
    plain = describe(small.folder, "f32", "cpu")
    int8 = describe(small.folder, "f32", "cpu", "int8")
    assert (plain.kv_dtype, int8.kv_dtype, int8.dtype) == ("float32", "int8", "float32")
    assert plain.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert int8.kv_bytes_per_token == 2 * 2 * 2 * (16 + 4)


def with_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, {"format": "pt"})


@pytest.mark.parametrize("prefix", ["self_attn", "self_attn.k_proj"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_that_a_checkpoint_has_for_its_kv_change_nothing(
    make_checkpoint: Any, prefix: str, shape: tuple[int, ...]
) -> None:
    saved = make_checkpoint()
    before = generate(saved.load())
    name = f"model.layers.1.{prefix}.k_scale"
    with_tensors(saved.folder, **{name: torch.full(shape, 0.25)})
    assert generate(saved.load()) == before
    with_tensors(saved.folder, **{name: torch.full(shape, torch.nan)})
    with pytest.raises(ModelError, match=r"k_scale holds values that are not numbers"):
        saved.load()


@pytest.mark.parametrize("name", ["model.k_scale", "model.layers.0.mlp.k_scale"])
def test_a_scale_that_belongs_to_no_keys_is_unexpected(make_checkpoint: Any, name: str) -> None:
    saved = make_checkpoint()
    with_tensors(saved.folder, **{name: torch.ones(())})
    with pytest.raises(ModelError, match=f"unexpected: {name}"):
        saved.load()
