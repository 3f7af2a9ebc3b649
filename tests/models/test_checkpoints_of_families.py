"""What checkpoints of single families spell in their own way, and what they have too much."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, ModelConfig, load_backend
from vllm_models.components.latent import PerHead
from vllm_models.components.linear import Dense, Linear
from vllm_models.components.rotary import RotaryEmbedding
from vllm_models.json_fields import JsonFields
from vllm_traits import ModelError, Request, SamplingParams

PROMPT = tuple(random.Random(3).choices(range(3, 128), k=25))
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = EXPERTS | {"n_routed_experts": 4, "num_hidden_layers": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.6, 2.0, 2.5, 3.0],
    "long_factor": [1.5, 2.5, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0],
}
QWQ = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def greedy(checkpoint: Any, num_tokens: int, **options: Any) -> tuple[int, ...]:
    engine = Engine(checkpoint.load(**options), SchedulerConfig())
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    engine.add(Request("it", PROMPT, params))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return sum((o.token_ids for o in outputs), ())


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def stack(tensors: dict[str, torch.Tensor]) -> None:
    """Experts of a layer as one tensor, gate and up together."""
    pattern = re.compile(r"(.*\.experts)\.\d+\.gate_proj\.weight")
    for path in {found[1] for name in tensors if (found := pattern.fullmatch(name))}:
        pop = lambda e, part: tensors.pop(f"{path}.{e}.{part}_proj.weight")  # noqa: B023, E731
        gate_up = [torch.cat((pop(e, "gate"), pop(e, "up"))) for e in range(4)]
        tensors[f"{path}.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{path}.down_proj"] = torch.stack([pop(e, "down") for e in range(4)])


@pytest.mark.parametrize(
    ("family", "fields"), [("qwen3_moe", EXPERTS | {"num_experts": 4}), ("glm4_moe", GROUPED)]
)
def test_stacked_experts_read_as_separate_ones(
    family: str, fields: dict[str, Any], make_checkpoint: Any
) -> None:
    checkpoint = make_checkpoint(family, **fields)
    separate = greedy(checkpoint, 12)
    rewrite(checkpoint.folder, stack)
    names = load_file(checkpoint.folder / "model.safetensors")
    assert not any("experts.0." in name for name in names)
    assert greedy(checkpoint, 12) == separate == checkpoint.greedy(PROMPT, 12)


def test_layers_behind_the_last_are_passed_over(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint("glm4_moe", **GROUPED)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(48, 96)
        tensors["model.layers.2.mlp.gate.e_score_correction_bias"] = torch.ones(4)
        tensors["model.layers.2.shared_head.norm.weight"] = torch.ones(48)

    rewrite(checkpoint.folder, add)
    assert greedy(checkpoint, 8) == checkpoint.greedy(PROMPT, 8)


def test_experts_scored_in_an_unknown_way_are_refused(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(
        "glm4_moe", rewrite=lambda fields: fields.update(scoring_func="softmax"), **GROUPED
    )
    with pytest.raises(ModelError, match="scoring_func"):
        checkpoint.load()


def test_longrope_keeps_short_factors_while_all_sequences_are_short(make_checkpoint: Any) -> None:
    checkpoint = make_checkpoint(
        "phi3",
        hidden_size=64,
        original_max_position_embeddings=64,
        rope_parameters=LONGROPE,
    )
    wanted = checkpoint.greedy(PROMPT, 30)
    assert greedy(checkpoint, 30, max_model_len=64) == wanted
    assert greedy(checkpoint, 30) != wanted, "the factors for long contexts differ"
    infos = (checkpoint.load().info, checkpoint.load(max_model_len=64).info)
    assert infos[0].fingerprint != infos[1].fingerprint, "neither can use the KV of the other"


class Halved(Dense):
    """A format that keeps half of every number."""

    def pack(self, layer: Linear) -> None:
        layer.weight.mul_(0.5)

    def dequantize(self, layer: Linear) -> torch.Tensor:
        return layer.weight.float() * 2


def test_what_makes_keys_of_latents_is_plain_numbers_in_any_format() -> None:
    layer = PerHead(rank=6, num_heads=3, key_dim=4, value_dim=2)
    layer.use(Halved())
    weight = torch.randn(18, 6)
    dict(layer.places("kv_b_proj"))["kv_b_proj.weight"].take(weight)
    layer.method.pack(layer)
    keys, values = layer.matrices()
    assert torch.equal(keys[1], weight[6:10]) and torch.equal(values[2], weight[16:])


def test_a_qwq_config_has_no_window() -> None:
    config = ModelConfig.from_fields(JsonFields(QWQ, "config.json"), frozenset())
    assert set(config.windows) == {0}


def test_dynamic_scaling_changes_nothing_in_the_models_own_context() -> None:
    scaled = QWQ | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}
    plain, dynamic = (
        ModelConfig.from_fields(JsonFields(fields, "config.json"), frozenset())
        for fields in (QWQ, scaled)
    )
    frequencies = [RotaryEmbedding(128, c.rope).inverse_wavelengths for c in (plain, dynamic)]
    assert torch.equal(*frequencies) and dynamic.max_position == 40960


def test_old_olmo3_fields_stretch_only_layers_without_a_window() -> None:
    fields = QWQ | {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
    }
    del fields["use_sliding_window"]
    config = ModelConfig.from_fields(JsonFields(fields, "config.json"), frozenset())
    assert (config.rope.kind, config.local_rope.kind) == ("yarn", "default")
    assert config.local_rope.theta == config.rope.theta == 500000.0
    assert [bool(window) for window in config.windows[:5]] == [True, True, True, False, True]


def test_the_first_chatglm_is_refused_by_a_list_of_what_runs(tmp_path: Path) -> None:
    fields = {"architectures": ["ChatGLMModel"], "model_type": "chatglm", "num_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"ChatGLMModel.*Glm4ForCausalLM"):
        load_backend(BackendOptions(tmp_path))
