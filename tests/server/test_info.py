"""`vllm-lite info`: headers only, the right figures, and what fits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_models.hub import resolve_model
from vllm_models.weights.saved import SavedTensor
from vllm_server.cli import run_command

pytestmark = pytest.mark.usefixtures("restored_process")


def info(capsys, *words):
    assert run_command("info", [*words, "--device", "cpu"]) == 0
    return capsys.readouterr().out


def test_the_figures_are_those_of_the_embedded_model(capsys):
    found = json.loads(info(capsys, "--json", "--dtype", "f32"))
    weights = load_file(resolve_model("builtin") / "model.safetensors")
    assert found["parameters"] == sum(weight.numel() for weight in weights.values())
    assert found["weight_bytes"] == sum(w.numel() * w.element_size() for w in weights.values())
    assert found["weight_bytes"] == sum(g["bytes"] for g in found["tensor_groups"].values())
    assert found["kv_bytes_per_token"] == 5 * 2 * 2 * 64 * 4
    assert (found["architecture"], found["context_length"]) == ("Qwen3ForCausalLM", 2048)
    beside = found["free_bytes"] * 0.9 - found["weight_bytes"]
    assert found["kv_tokens_that_fit"] == int(beside) // found["kv_bytes_per_token"]


def test_types_are_listed_by_what_the_tensors_do(capsys):
    groups = json.loads(info(capsys, "--json"))["tensor_groups"]
    assert list(groups) == ["embedding", "attention", "feed-forward", "norms"]
    assert groups["feed-forward"]["tensors"] == 15
    assert list(groups["feed-forward"]["bytes_by_type"]) == ["BF16"]


def test_no_weight_is_read(capsys, monkeypatch):
    def fail(_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SavedTensor, "read", property(fail))
    assert "4.98 M" in info(capsys, "builtin")


def test_a_model_that_does_not_fit_is_said_not_to(capsys, monkeypatch):
    monkeypatch.setattr("vllm_models.describe.free_memory", lambda _: 5 << 20)
    text = info(capsys)
    assert "5.00 MiB free on cpu: the weights do not fit" in text


def test_a_folder_that_is_no_model_ends_with_the_code_for_models(capsys, tmp_path):
    assert run_command("info", [str(tmp_path)]) == 3
    assert "config.json" in capsys.readouterr().err


def test_an_architecture_that_is_not_there_is_refused(capsys, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    source = json.loads((resolve_model("builtin") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source | {"architectures": ["ChatGLMModel"]}))
    assert run_command("info", [str(tmp_path)]) == 3
    assert "Supported: " in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_is_not_described(capsys, tmp_path):
    weights = load_file(resolve_model("builtin") / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config = (resolve_model("builtin") / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert run_command("info", [str(tmp_path)]) == 3
    assert "missing: model.norm.weight" in capsys.readouterr().err
    quantized = json.loads(config) | {"quantization_config": {"quant_method": "abacus"}}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    assert run_command("info", [str(tmp_path)]) == 3
    assert "'abacus' is not supported" in capsys.readouterr().err
