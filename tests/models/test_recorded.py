"""Decode steps that are repeated from a recording."""

from __future__ import annotations

from typing import Any

import pytest
from vllm_core import Engine, SchedulerConfig
from vllm_models import TorchBackend
from vllm_models.components import experts
from vllm_models.native.library import library
from vllm_models.runner import recorded
from vllm_traits import Request, SamplingParams

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")


def generate(backend: TorchBackend, count: int, num_tokens: int = 8) -> dict[str, tuple[Any, ...]]:
    """Tokens and log-probabilities of requests that run side by side."""
    engine = Engine(backend, SchedulerConfig(prefix_cache=False))
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=3)
    found: dict[str, tuple[Any, ...]] = {}
    for number in range(count):
        found[str(number)] = ()
        engine.add(Request(str(number), tuple(range(5, 9 + number)), params))
    while engine.has_work():
        for output in engine.step():
            found[output.request_id] += (*output.token_ids, *output.logprobs)
    return found


def recordings(backend: TorchBackend) -> list[int]:
    steps = backend._runner._recorded
    return [] if steps is None else sorted(steps._recordings)


@pytest.mark.parametrize("count", [1, 3])
def test_a_repeated_step_gives_the_bits_of_a_walk_through_the_layers(
    small: Any, count: int
) -> None:
    repeated = small.load(block_size=16)
    walked = small.load(block_size=16, enforce_eager=True)
    assert generate(repeated, count) == generate(walked, count)
    assert count in recordings(repeated) and not recordings(walked)


def test_steps_of_many_rows_are_not_recorded(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MAX_ROWS", 2)
    backend = small.load(block_size=16)
    generate(backend, 5)
    assert max(recordings(backend)) <= 2


def test_recordings_end_where_their_memory_does(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "MAX_BYTES", 1)
    backend = small.load(block_size=16)
    generate(backend, 1)
    generate(backend, 2)
    assert len(recordings(backend)) == 1


EXPERTS = {
    "qwen2_moe": {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 5},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_every_token_of_a_repeated_step_has_experts_of_its_own(
    make_checkpoint: Any, family: str
) -> None:
    fields = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
    checkpoint = make_checkpoint(family, **(fields | EXPERTS[family]))
    repeated = checkpoint.load(block_size=16)
    walked = checkpoint.load(block_size=16, enforce_eager=True)
    assert generate(repeated, 3) == generate(walked, 3)
    assert 3 in recordings(repeated)


def test_a_model_whose_steps_depend_on_numbers_walks(
    make_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of different kinds are computed one by one, and which follows from the numbers."""
    monkeypatch.setattr(experts, "find_group", lambda found: None)
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    backend = make_checkpoint("qwen3_moe", **fields).load(block_size=16)
    generate(backend, 2)
    assert recordings(backend) == []
