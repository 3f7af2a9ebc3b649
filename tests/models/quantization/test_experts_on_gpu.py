"""Whole models whose experts differ in how they are held, on the path of a GPU."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file
from vllm_core import Engine, SchedulerConfig
from vllm_models.runner.device.assemble import _can_capture
from vllm_models.runner.device.runner import DeviceRunner
from vllm_traits import Request, SamplingParams

from tests.models.quantization import packers
from tests.models.quantization.packers import Packer
from tests.models.quantization.test_checkpoints import GPTQ, WEIGHTS, write_packed

PROMPT = tuple(random.Random(3).choices(range(3, 128), k=33))  # whose pairs are sorted by expert
NUM_TOKENS = 2
VOCAB_SIZE = 128
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def ordered() -> Packer:
    """Every part of a layer has an order of columns of its own."""
    seeds = itertools.count()
    return lambda weight: packers.gptq(weight, order_seed=next(seeds))


class Checkpoint(NamedTuple):
    """How its layers are packed; see `write_packed`."""

    config: dict[str, Any]
    pack: Packer
    own: Mapping[str, Packer | None] = {}


CHECKPOINTS = {
    "an order of columns for each": Checkpoint(
        GPTQ | {"desc_act": True}, ordered(), {"self_attn": None}
    ),
    "formats for each": Checkpoint(
        GPTQ | {"dynamic": {r"+:.*\.experts\.2\.": {"bits": 8}}},
        packers.gptq,
        {
            "self_attn": None,
            ".experts.1.": None,
            ".experts.2.": lambda weight: packers.gptq(weight, bits=8),
            ".experts.3.": ordered(),
        },
    ),
}


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Any]) -> Any:
    return make_checkpoint("qwen3_moe", **SHAPE)


def copies(plain: Any, folder: Path, name: str) -> tuple[Any, Any]:
    """The checkpoint in the formats of a name, and the HF model of the same numbers."""
    chosen = CHECKPOINTS[name]
    numbers = write_packed(plain.folder, folder / "packed", *chosen)
    reference = shutil.copytree(plain.folder, folder / "numbers")
    save_file(numbers, reference / WEIGHTS, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    return type(plain)(folder / "packed", model.eval())


def scored(backend: Any) -> tuple[tuple[int, ...], torch.Tensor]:
    """Tokens after the prompt, and log-probabilities [positions, V] from its second token on."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        logprobs=VOCAB_SIZE,
        prompt_logprobs=VOCAB_SIZE,
    )
    engine = Engine(backend, SchedulerConfig())
    engine.add(Request("only", PROMPT, params))
    tokens, rows = (), []
    while engine.has_work():
        for output in engine.step():
            assert output.error is None, output
            tokens += output.token_ids
            entries = (*output.prompt_logprobs, *output.logprobs)
            rows += [dict(entry.top) for entry in entries if entry is not None]
    return tokens, torch.tensor([[row[i] for i in range(VOCAB_SIZE)] for row in rows])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_experts_held_differently_compute_without_asking_the_host(
    plain: Any, tmp_path: Path, triton_path: None, name: str
) -> None:
    """As the numbers they stand for, in decode steps that can be captured."""
    copy = copies(plain, tmp_path, name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = copy.load(block_size=16, max_sequences=2, device=device)
    assert isinstance(backend._runner, DeviceRunner)
    assert _can_capture(backend._runner.model)
    tokens, logprobs = scored(backend)
    assert tokens == copy.greedy(PROMPT, NUM_TOKENS)
    wanted = copy.logits(PROMPT + tokens).log_softmax(-1)[: len(logprobs)]
    assert len(logprobs) == len(PROMPT) - 1 + NUM_TOKENS
    assert (logprobs - wanted).abs().max() < 1e-2
