"""Weights that are quantized while they are loaded."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions
from vllm_models.components.decoder import Decoder
from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.gguf.mixture import ISQ_NAMES, MIXTURES, Shape, choose_type, find_mixture
from vllm_models.gguf.types import GgmlType
from vllm_models.options import ignore_progress
from vllm_models.quantization.isq import IsqScheme
from vllm_models.registry import find_architecture
from vllm_models.weights.checkpoint import open_checkpoint
from vllm_models.weights.load import load_model, num_bytes
from vllm_models.weights.saved import SavedTensor
from vllm_traits import ConfigError, ModelError, Request, SamplingParams

T = GgmlType
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "initializer_range": 0.05,
    "num_hidden_layers": 3,
}


@pytest.fixture(scope="module")
def wide(make_checkpoint: Any) -> Any:
    """Rows of whole blocks everywhere."""
    return make_checkpoint(family="qwen3", saved_as=torch.bfloat16, **WIDE)


def load(checkpoint: Any, name: str | None) -> Decoder:
    files = open_checkpoint(checkpoint.folder)
    config = ModelConfig.from_fields(files.fields, files.eos_token_ids)
    scheme = None if name is None else IsqScheme(name)
    target = (torch.float32, torch.device("cpu"))
    architecture = find_architecture(config.architecture)
    return load_model(architecture, config, files, scheme, target, ignore_progress)


def kinds(model: Decoder) -> dict[str, str]:
    """Types of the parts of every linear layer."""
    return {
        path: " ".join(kind.name for kind in getattr(module.method, "kinds", {}).values())
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }


def weights(model: Decoder) -> Tensor:
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    return torch.cat([layer.method.dequantize(layer).flatten() for layer in layers])


def test_q4k_gives_sensitive_layers_more(wide: Any) -> None:
    found = kinds(load(wide, "q4k"))
    assert found["lm_head"] == "Q6_K"
    assert found["model.embed_tokens"] == "Q4_K"
    assert found["model.layers.0.mlp.down_proj"] == "Q4_K"
    assert found["model.layers.2.mlp.down_proj"] == "Q6_K"
    qkv = [found[path] for path in found if path.endswith("qkv_proj")]
    assert qkv == ["Q4_K Q4_K Q4_K", "Q4_K Q4_K Q4_K", "Q4_K Q4_K Q6_K"]


def test_errors_follow_the_bits(wide: Any) -> None:
    exact = weights(load(wide, None))
    errors = [
        float((weights(load(wide, name)) - exact).norm())
        for name in ("q8_0", "q6k", "q5k", "q4k", "q3k", "q2k")
    ]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_logits_follow_the_bits(wide: Any) -> None:
    """Of the whole model, which transformers computes from the weights as they came out."""
    prompt = tuple(range(3, 60))
    exact = wide.logits(prompt)
    errors: list[float] = []
    for name in ("q8_0", "q6k", "q4k", "q2k"):
        quantized = load(wide, name)
        errors.append(float((_logits(wide.model, quantized, prompt) - exact).norm() / exact.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.05


@torch.inference_mode()
def _logits(model: Any, quantized: Decoder, prompt: tuple[int, ...]) -> Tensor:
    theirs = model.state_dict()
    kept = {name: tensor.clone() for name, tensor in theirs.items()}
    for path, module in quantized.named_modules():
        if isinstance(module, Linear):
            whole = module.method.dequantize(module)
            for part in module.parts:
                theirs[f"{module.name_of(path, part)}.weight"].copy_(whole[module.rows(part)])
    try:
        return model(torch.tensor([prompt])).logits[0].float()
    finally:
        for name, tensor in kept.items():
            theirs[name].copy_(tensor)


class _Counting(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    now = peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_held(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_held(leaf) and _storage(leaf) not in given:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _is_held(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def test_no_more_is_ever_held_than_the_blocks_and_one_weight(make_checkpoint: Any) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 64}
    checkpoint = make_checkpoint(saved_as=torch.bfloat16, **sizes)
    with _Counting() as counted:
        model = load(checkpoint, "q4k")
    largest = 512 * 1024 * 4
    assert num_bytes(model) <= counted.peak < num_bytes(model) + largest
    plain = sum(parameter.numel() for parameter in checkpoint.model.parameters()) * 2
    assert num_bytes(model) < 0.32 * plain


def test_rows_of_other_sizes_fall_back_with_one_warning(
    make_checkpoint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = make_checkpoint(hidden_size=96, intermediate_size=80, head_dim=32)
    with caplog.at_level(logging.WARNING):
        found = kinds(load(checkpoint, "q4k"))
    assert found["lm_head"] == "Q8_0"
    assert found["model.layers.0.mlp.down_proj"] == ""  # 80 columns stay plain
    [record] = [r for r in caplog.records if "Q8_0" in r.getMessage()]
    assert "16 weights have rows of 80, 96, 128" in record.getMessage()


def test_routers_stay_plain(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(
        family="qwen3_moe",
        hidden_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )
    found = kinds(load(checkpoint, "q8_0"))
    gates = {path: kind for path, kind in found.items() if path.endswith(".gate")}
    assert gates and set(gates.values()) == {""}
    experts = {kind for path, kind in found.items() if ".experts." in path}
    assert experts and "" not in experts


@pytest.mark.parametrize("name", ["q8_0", "Q5_1"])
def test_a_backend_quantizes_on_request(wide: Any, name: str) -> None:
    prompt = tuple(range(3, 40))
    backend = wide.load(isq=name)
    plain = sum(parameter.numel() for parameter in wide.model.parameters()) * 4
    assert backend.memory.weight_bytes < 0.35 * plain
    engine = Engine(backend, SchedulerConfig())
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=3)
    engine.add(Request("one", prompt, params))
    [output] = [output for _ in range(9) if engine.has_work() for output in engine.step()]
    likely = wide.logits(prompt)[-1].topk(3).indices.tolist()
    assert output.token_ids[0] in likely


def test_a_backend_refuses_unknown_types_before_it_loads() -> None:
    with pytest.raises(ConfigError, match="isq is 'q9'"):
        BackendOptions(Path("absent"), isq="q9")


@pytest.mark.parametrize("kind", ["Q4_K", "I32", "F8_E4M3"])
def test_quantized_checkpoints_are_refused(kind: str) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    read = lambda: torch.zeros(1)  # noqa: E731
    saved = {name: SavedTensor(name, (8, 256), kind, "model.file", 1, read, lambda: None)}
    with pytest.raises(ModelError, match=r"model\.file.*quantized already"):
        IsqScheme("q4k").method(["model.layers.0.self_attn.q_proj"], Linear(256, 8), saved)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("q4k", "q4_k_m"),
        ("Q4_K", "q4_k_m"),
        ("q4_k_s", "q4_k_s"),
        ("q2k", "q2_k"),
        ("q6K", "q6_k"),
        ("q40", "q4_0"),
        ("q4", "q4_0"),
        ("q41", "q4_1"),
        ("q50", "q5_0"),
        ("q5", "q5_0"),
        ("q51", "q5_1"),
        ("q80", "q8_0"),
        ("Q8", "q8_0"),
        ("Q8_0", "q8_0"),
    ],
)
def test_names_have_many_spellings(spelled: str, name: str) -> None:
    assert find_mixture(spelled) is MIXTURES[name]


@pytest.mark.parametrize("name", ["q9", "f16", "bf16", "", "q4_k_x"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="q4k"):
        IsqScheme(name)


def test_every_listed_name_is_known() -> None:
    assert all(find_mixture(name) for name in ISQ_NAMES)


def test_what_few_heads_share_is_held_better() -> None:
    model = Shape(num_layers=80, share=8, num_experts=8, tied=False)
    value = "model.layers.40.self_attn.v_proj"
    assert choose_type(MIXTURES["q4_k_m"], value, 256, model) == T.Q8_0
    assert choose_type(MIXTURES["q2_k"], value, 256, model._replace(num_experts=0)) == T.Q4_K
    tied = model._replace(tied=True)
    assert choose_type(MIXTURES["q4_k_m"], "model.embed_tokens", 256, tied) == T.Q6_K
