"""What can only be seen on a GPU: captured steps, launches that never wait, and overlap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm_core import Engine
from vllm_core.config import SchedulerConfig
from vllm_models import TorchBackend
from vllm_traits import Batch, Chunk, Request, SamplingParams, Start

from benchmarks.cpu.shapes import TINY, Shape
from benchmarks.gpu.models import TINY_EXPERTS, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WISHES = (
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=20, seed=2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.8, min_p=0.01, seed=3, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0.0, presence_penalty=0.5, max_tokens=12, ignore_eos=True),
)


@contextmanager
def loaded(shape: Shape = TINY, weights: str = "bf16", **options: Any) -> Iterator[TorchBackend]:
    """A tiny model on the device."""
    chosen = {"num_blocks": 64, "max_model_len": 128, "max_sequences": 8, "max_batch_tokens": 64}
    backend = load(shape, weights, torch.device("cuda:0"), **(chosen | options))
    try:
        yield backend
    finally:
        backend.close()


def outputs(backend: TorchBackend, overlap: bool = True) -> dict[str, list[int]]:
    """Tokens of requests of every kind, of different lengths, in batches that shrink."""
    engine = Engine(backend, SchedulerConfig(overlap=overlap, prefix_cache=False))
    made: dict[str, list[int]] = {}
    for number, params in enumerate(WISHES):
        prompt = tuple((7 * number + place) % 390 for place in range(5 + 11 * number))
        engine.add(Request(str(number), prompt, params))
    while engine.has_work():
        for output in engine.step():
            assert output.error is None
            made.setdefault(output.request_id, []).extend(output.token_ids)
    assert {name: len(ids) for name, ids in made.items()} == {
        str(number): params.max_tokens for number, params in enumerate(WISHES)
    }
    return made


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("weights", ["bf16", "fp8", "w4"])
def test_captured_steps_give_the_tokens_of_steps_that_are_walked(
    shape: Shape, weights: str
) -> None:
    with loaded(shape, weights) as captured:
        expected = outputs(captured)
    with loaded(shape, weights, enforce_eager=True) as walked:
        assert outputs(walked) == expected


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_overlapped_steps_give_the_tokens_of_steps_one_by_one(kv_cache_dtype: str) -> None:
    with loaded(kv_cache_dtype=kv_cache_dtype) as backend:
        expected = outputs(backend, overlap=False)
    with loaded(kv_cache_dtype=kv_cache_dtype) as backend:
        assert outputs(backend, overlap=True) == expected


def test_a_request_has_the_same_tokens_alone_and_in_company_where_sums_have_one_order() -> None:
    with loaded(deterministic=True, max_sequences=1) as alone:
        expected = outputs(alone)
    with loaded(deterministic=True) as together:
        assert outputs(together) == expected


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    known = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(known)


@pytest.mark.parametrize("shape", [TINY, TINY_EXPERTS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_launching_decode_steps_never_waits_for_the_device(
    shape: Shape, enforce_eager: bool
) -> None:
    with loaded(shape, enforce_eager=enforce_eager) as backend:
        start = Start(0, (1, 2, 3), WISHES[1], num_prompt_tokens=3)
        backend.forward(Batch((Chunk(0, 0, 3, (0, 1)),), (start,))).result()
        backend.forward(Batch((Chunk(0, 3, 1),))).result()
        with waiting_is_an_error():
            flights = [backend.forward(Batch((Chunk(0, place, 1),))) for place in range(4, 8)]
        tokens = [flight.result() for flight in flights]
        backend.forward(Batch((), released=(0,))).result()
    assert len(tokens) == 4


def test_a_prompt_is_launched_without_waiting_for_the_device() -> None:
    with loaded() as backend:
        start = Start(0, tuple(range(20)), WISHES[0], num_prompt_tokens=20)
        with waiting_is_an_error():
            flight = backend.forward(Batch((Chunk(0, 0, 20, (0, 1)),), (start,)))
        assert flight.result()
