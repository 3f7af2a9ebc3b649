"""KV blocks in host memory, and what an engine gains by them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_models.components.context import LayerKV
from vllm_models.runner.host_store import HostStore
from vllm_models.runner.kv import KVPool, allocate_kv
from vllm_traits import Request, SamplingParams

LAYERS = (LayerKV(0, 2, 16, 16), LayerKV(8, 2, 16, 16), LayerKV(0, 1, 20, 0))


@pytest.fixture(params=[torch.float32, torch.int8, torch.float8_e4m3fn])
def kv(request: pytest.FixtureRequest) -> KVPool:
    pool = allocate_kv(LAYERS, 12, 4, torch.float32, torch.device("cpu"), request.param)
    for tensor in pool.tensors:
        tensor.copy_(torch.rand(tensor.shape) * 100)
    return pool


def keys(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def contents(pool: KVPool, block: int) -> list[torch.Tensor]:
    return [tensor[:, block].clone() for tensor in pool.tensors]


def test_a_saved_block_comes_back_whole_in_every_layer(kv: KVPool) -> None:
    store = HostStore(kv, 8)
    before = [contents(kv, block) for block in (3, 7)]
    assert store.save(keys("a", "b"), [3, 7]).result() == 2
    kv.wipe([3, 7])
    assert not any(tensor.any() for block in (3, 7) for tensor in contents(kv, block))
    loading = store.load(keys("a", "b"), [9, 1])
    assert loading.done() and loading.result() == 2
    for block, expected in zip((9, 1), before, strict=True):
        for one, other in zip(contents(kv, block), expected, strict=True):
            assert torch.equal(one, other)


def test_lookup_counts_the_leading_keys_that_are_held(kv: KVPool) -> None:
    store = HostStore(kv, 8)
    store.save(keys("a", "b", "d"), [0, 1, 2])
    assert store.lookup(keys("a", "b", "c", "d")) == 2
    assert store.lookup(keys("x", "a")) == 0
    assert store.lookup([]) == 0


def test_the_block_that_was_not_used_for_longest_makes_room(kv: KVPool) -> None:
    store = HostStore(kv, 2)
    store.save(keys("a", "b"), [0, 1])
    store.load(keys("a"), [5])
    store.save(keys("c"), [2])
    assert [store.lookup(keys(name)) for name in "abc"] == [1, 0, 1]


def test_more_blocks_than_there_is_room_for_are_kept_in_part(kv: KVPool) -> None:
    store = HostStore(kv, 2)
    assert store.save(keys("a", "b", "c"), [0, 1, 2]).result() == 2
    assert store.lookup(keys("a", "b", "c")) == 2


def test_a_load_of_keys_that_are_gone_brings_those_before_them(kv: KVPool) -> None:
    store = HostStore(kv, 4)
    store.save(keys("a"), [0])
    assert store.load(keys("a", "z"), [4, 5]).result() == 1


def run(backend: Any, num_requests: int = 6) -> tuple[list[tuple[int, ...]], Engine]:
    """Each prompt twice, so that the second time its blocks are wanted again."""
    engine = Engine(backend, SchedulerConfig(watermark=0.0))
    rng = random.Random(5)
    prompts = [tuple(rng.choices(range(3, 128), k=40)) for _ in range(num_requests)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    texts: list[tuple[int, ...]] = []
    for number, prompt in enumerate(prompts * 2):
        engine.add(Request(str(number), prompt, params))
        tokens: tuple[int, ...] = ()
        while engine.has_work():
            for output in engine.step():
                assert output.error is None, output
                tokens += output.token_ids
        texts.append(tokens)
    return texts, engine


@pytest.mark.parametrize("stored", ["auto", "int8"])
def test_a_small_pool_with_host_memory_gives_the_texts_of_a_large_one(
    small: Any, stored: str
) -> None:
    large, _ = run(small.load(num_blocks=256, kv_cache_dtype=stored))
    texts, engine = run(small.load(num_blocks=20, host_kv_share=8.0, kv_cache_dtype=stored))
    assert texts == large
    assert engine.stats.saved_blocks > 0 and engine.stats.loaded_blocks > 0


def test_without_host_memory_nothing_is_saved(small: Any) -> None:
    backend = small.load(num_blocks=20)
    assert backend.stores == ()
    _, engine = run(backend, 2)
    assert engine.stats.saved_blocks == 0
