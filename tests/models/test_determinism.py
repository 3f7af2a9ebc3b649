"""Results do not depend on the batch: the same bits alone, in company, in chunks, after a prefix
hit, after a preemption and after a restart. On by default on a CPU with its kernels.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, TorchBackend, load_backend, resolve_model
from vllm_models.native.library import library
from vllm_traits import Batch, Request, RequestOutput, SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
NUM_TOKENS = 12
BLOCK = 16
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=4),
    "seeded": SamplingParams(
        temperature=1.0, top_p=0.95, seed=7, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=4
    ),
}
PROMPTS = {
    name: tuple(random.Random(name).choices(range(5, 120), k=length))
    for name, length in (("greedy", 75), ("seeded", 41))
}
Results = dict[str, tuple[tuple[int, ...], tuple[Any, ...]]]


@dataclass
class Model:
    """Backends over one checkpoint, by number of KV blocks, and what a request alone gives."""

    options: BackendOptions
    backends: dict[int, TorchBackend] = field(default_factory=dict)
    alone: Results = field(default_factory=dict)

    def backend(self, num_blocks: int) -> TorchBackend:
        """Without the rows that its last engine left."""
        if num_blocks not in self.backends:
            self.backends[num_blocks] = self.load(num_blocks)
        self.backends[num_blocks].forward(Batch((), released=tuple(range(100)))).result()
        return self.backends[num_blocks]

    def load(self, num_blocks: int) -> TorchBackend:
        changes = {"num_blocks": num_blocks, "max_sequences": 40, "max_model_len": 112}
        fields = {"block_size": BLOCK, "threads": 1, "device": "cpu"} | changes
        fields["kv_cache_dtype"] = self.options.kv_cache_dtype
        return load_backend(BackendOptions(self.options.model, self.options.dtype, **fields))


@pytest.fixture(scope="module", params=["embedded-bf16", "embedded-f32", "random-f32"])
def model(request: pytest.FixtureRequest, make_checkpoint: Any) -> Model:
    name, dtype = request.param.split("-")
    folder = resolve_model("builtin") if name == "embedded" else make_checkpoint("qwen3").folder
    return alone(BackendOptions(folder, dtype))


@pytest.fixture(scope="module", params=["bf16", "f32"])
def int8_model(request: pytest.FixtureRequest) -> Model:
    return alone(BackendOptions(resolve_model("builtin"), request.param, kv_cache_dtype="int8"))


def alone(options: BackendOptions) -> Model:
    """A model, with what each target gives alone."""
    found = Model(options)
    for kind in PARAMS:
        engine = Engine(found.backend(512), SchedulerConfig(prefix_cache=False))
        found.alone |= run(engine, [target(kind)])
    return found


def target(kind: str) -> Request:
    return Request(kind, PROMPTS[kind], PARAMS[kind])


def stranger(number: int) -> Request:
    rng = random.Random(number)
    prompt = tuple(rng.choices(range(5, 120), k=rng.randint(1, 90)))
    params = SamplingParams(temperature=0.9, seed=number, max_tokens=20, ignore_eos=True)
    return Request(f"stranger-{number}", prompt, params)


def run(engine: Engine, requests: list[Request]) -> Results:
    """Tokens and log-probabilities of the targets, with nothing rounded."""
    outputs: dict[str, list[RequestOutput]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    for _ in range(3000):
        if not engine.has_work():
            break
        for output in engine.step():
            assert output.error is None, output
            outputs[output.request_id].append(output)
    return {
        kind: (
            sum((o.token_ids for o in outputs[kind]), ()),
            sum((o.logprobs for o in outputs[kind]), ()),
        )
        for kind in PARAMS
        if kind in outputs
    }


# Blocks for 7 of 32 sequences: some are preempted and computed again.
POOLS = {1: (512,), 2: (512,), 7: (512, 16), 32: (512, 40)}


@pytest.mark.parametrize("chunk", [16, 64, 2048])
@pytest.mark.parametrize("cache", ["off", "on", "warm"])
@pytest.mark.parametrize(
    ("batch", "num_blocks"), [(batch, pool) for batch, pools in POOLS.items() for pool in pools]
)
def test_every_way_to_run_a_request_gives_the_same_bits(
    model: Model, batch: int, num_blocks: int, cache: str, chunk: int
) -> None:
    check_same_bits(model, batch, num_blocks, cache, chunk)


@pytest.mark.parametrize("chunk", [16, 2048])
@pytest.mark.parametrize(
    ("batch", "num_blocks", "cache"), [(1, 512, "warm"), (7, 16, "off"), (32, 40, "on")]
)
def test_so_does_every_way_with_kv_in_int8(
    int8_model: Model, batch: int, num_blocks: int, cache: str, chunk: int
) -> None:
    check_same_bits(int8_model, batch, num_blocks, cache, chunk)


def check_same_bits(model: Model, batch: int, num_blocks: int, cache: str, chunk: int) -> None:
    config = SchedulerConfig(max_batch_tokens=chunk, prefix_cache=cache != "off", watermark=0.0)
    engine = Engine(model.backend(num_blocks), config)
    if cache == "warm":
        assert run(engine, [target("greedy")])["greedy"] == model.alone["greedy"]
    targets = [target(kind) for kind in PARAMS][: 1 if batch == 1 else 2]
    strangers = [stranger(number) for number in range(batch - len(targets))]
    order = [*strangers[::2], *targets, *strangers[1::2]]
    found = run(engine, order)
    assert found == {kind: model.alone[kind] for kind in found}
    if num_blocks < 512:
        assert engine.stats.preemptions > 0


def test_a_restart_gives_the_same_bits(model: Model) -> None:
    engine = Engine(model.load(64), SchedulerConfig())
    assert run(engine, [target(kind) for kind in PARAMS]) == model.alone


def test_the_number_of_threads_changes_no_bit(model: Model) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (
            run(Engine(model.backend(512)), [target("greedy")])["greedy"] == model.alone["greedy"]
        )
    finally:
        torch.set_num_threads(before)


def test_the_matrix_is_large_enough() -> None:
    assert 3 * len(list(product(range(3), range(3), sum(POOLS.values(), ())))) >= 96
