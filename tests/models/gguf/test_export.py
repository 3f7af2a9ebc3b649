"""GGUF files that are written from checkpoints, and read by the `gguf` package and by ourselves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from vllm_core import Engine, SchedulerConfig
from vllm_models import BackendOptions, load_backend
from vllm_models.config import ModelConfig
from vllm_models.gguf.export import export_gguf
from vllm_models.gguf.header import read_header
from vllm_models.gguf.mixture import MIXTURES
from vllm_models.gguf.types import GgmlType
from vllm_models.options import LoadProgress, ignore_progress
from vllm_models.weights.checkpoint import open_checkpoint
from vllm_traits import ModelError, Request, SamplingParams

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BIG = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.08}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied-wide-heads": {"tie_word_embeddings": True, "head_dim": 24},
    "llama3": {"rope_parameters": LLAMA3},
    "llama-linear": {"rope_parameters": LINEAR},
    "llama-yarn": {"rope_parameters": YARN},
    "mistral-window": {"family": "mistral", "sliding_window": 6},
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "qwen2": {"family": "qwen2"},
    "qwen2-moe": {"family": "qwen2_moe", "shared_expert_intermediate_size": 40, **EXPERTS},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "qwen3-moe": {"family": "qwen3_moe", "norm_topk_prob": True, **EXPERTS},
}


def export(folder: Path, path: Path, name: str) -> Path:
    export_gguf(open_checkpoint(folder), path, MIXTURES[name], {}, ignore_progress)
    return path


def complete(path: Path, prompt: tuple[int, ...]) -> tuple[int, ...]:
    options = BackendOptions(path, dtype="f32", device="cpu", block_size=4, num_blocks=64)
    engine = Engine(load_backend(options), SchedulerConfig())
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add(Request("one", prompt, params))
    outputs = [output for _ in range(100) if engine.has_work() for output in engine.step()]
    return sum((output.token_ids for output in outputs), ())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_file_completes_as_the_checkpoint(
    make_checkpoint: Any, tmp_path: Path, variant: str
) -> None:
    checkpoint = make_checkpoint(**VARIANTS[variant])
    path = export(checkpoint.folder, tmp_path / "m.gguf", "f32")
    prompt = tuple(random.Random(3).choices(range(3, 128), k=21))
    assert complete(path, prompt) == checkpoint.greedy(prompt, 12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_file_says_what_the_checkpoint_says(
    make_checkpoint: Any, tmp_path: Path, variant: str
) -> None:
    folder = make_checkpoint(**VARIANTS[variant]).folder
    path = export(folder, tmp_path / "m.gguf", "f16")
    before, after = (
        ModelConfig.from_fields(found.fields, found.eos_token_ids)
        for found in (open_checkpoint(folder), open_checkpoint(path))
    )
    for name in ("architecture", "num_layers", "num_kv_heads", "head_dim", "vocab_size"):
        assert getattr(before, name) == getattr(after, name)
    assert (before.max_position, before.eos_token_ids) == (after.max_position, after.eos_token_ids)
    assert before.norm_eps == pytest.approx(after.norm_eps)


def test_the_wavelengths_of_llama3_are_those_of_transformers(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(rope_parameters=LLAMA3)
    path = export(checkpoint.folder, tmp_path / "m.gguf", "f32")
    [factors] = [t for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight"]
    plain = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    expected = checkpoint.model.model.rotary_emb.inv_freq
    found = plain / torch.from_numpy(factors.data.copy())
    assert torch.allclose(found, expected, rtol=1e-5)


def test_the_gguf_package_reads_the_types_of_a_mixture(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(family="qwen3", num_hidden_layers=3, **BIG)
    reader = gguf.GGUFReader(export(checkpoint.folder, tmp_path / "m.gguf", "q4_k_m"))
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q4_K"
    assert [kinds[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["Q4_K", "Q4_K", "Q6_K"]
    assert kinds["blk.0.attn_q_norm.weight"] == "F32"
    weight = checkpoint.model.model.layers[1].mlp.up_proj.weight.detach()
    [saved] = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(saved.data, saved.tensor_type))
    assert (found - weight).norm() / weight.norm() < 0.08


def test_experts_are_one_stack_and_routers_stay_exact(make_checkpoint: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "norm_topk_prob": True}
    checkpoint = make_checkpoint(family="qwen3_moe", **(EXPERTS | sizes))
    tensors = read_header(export(checkpoint.folder, tmp_path / "m.gguf", "q8_0")).tensors
    up = tensors["blk.0.ffn_up_exps.weight"]
    assert (up.shape, up.type) == ((6, 32, 64), GgmlType.Q8_0)
    assert tensors["blk.0.ffn_gate_inp.weight"].type == GgmlType.F32


def test_rows_that_no_block_divides_get_16_bits(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(hidden_size=48, intermediate_size=96)
    tensors = read_header(export(checkpoint.folder, tmp_path / "m.gguf", "q4_k_m")).tensors
    assert tensors["blk.0.ffn_up.weight"].type == GgmlType.F16
    assert tensors["blk.0.ffn_down.weight"].type == GgmlType.Q8_0


def test_a_file_can_be_written_from_a_file(small: Any, tmp_path: Path) -> None:
    first = export(small.folder, tmp_path / "first.gguf", "f32")
    second = export(first, tmp_path / "second.gguf", "f32")
    before, after = read_header(first).tensors, read_header(second).tensors
    assert before.keys() == after.keys()
    for name, info in before.items():
        other = after[name]
        assert (info.shape, info.type, info.num_bytes) == (
            other.shape,
            other.type,
            other.num_bytes,
        )
        assert _data(info) == _data(other)


def _data(info: Any) -> bytes:
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.num_bytes)


def test_progress_ends_at_the_whole(small: Any, tmp_path: Path) -> None:
    seen: list[LoadProgress] = []
    checkpoint = open_checkpoint(small.folder)
    export_gguf(checkpoint, tmp_path / "m.gguf", MIXTURES["q8_0"], {}, seen.append)
    fractions = [news.fraction for news in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_a_quantized_checkpoint_is_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(hidden_size=64, intermediate_size=64)
    path = export(checkpoint.folder, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(ModelError, match="quantized already"):
        export(path, tmp_path / "again.gguf", "q4_0")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mlp_only_layers", [1]), ("decoder_sparse_step", 2), ("norm_topk_prob", False)],
)
def test_what_readers_would_compute_otherwise_is_refused_by_name(
    make_checkpoint: Any, tmp_path: Path, name: str, value: object
) -> None:
    checkpoint = make_checkpoint(
        family="qwen3_moe",
        rewrite=lambda fields: fields.update({name: value}),
        **(EXPERTS | {"norm_topk_prob": True}),
    )
    with pytest.raises(ModelError, match=name):
        export(checkpoint.folder, tmp_path / "m.gguf", "f16")


def test_an_architecture_that_cannot_be_written_is_refused_by_name(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(
        rewrite=lambda fields: fields.update(architectures=["OtherForCausalLM"])
    )
    with pytest.raises(ModelError, match="OtherForCausalLM"):
        export(checkpoint.folder, tmp_path / "m.gguf", "f16")


def test_what_is_no_number_is_refused_with_file_and_name(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(hidden_size=64, intermediate_size=64).folder
    [file] = folder.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"safetensors: model\.layers\.0\.mlp\.up_proj"):
        export(folder, tmp_path / "m.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
