"""Checkpoints that are damaged, incomplete or hostile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_models import BackendOptions, LoadProgress, load_backend
from vllm_models.weights.safetensors import INDEX_NAME
from vllm_traits import DeviceError, ModelError


@pytest.fixture
def folder(small: Any, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(small.folder, tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **options: Any) -> Any:
    return load_backend(BackendOptions(folder, dtype="f32", num_blocks=16, **options))


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_everything_that_does_not_fit_is_reported_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
        tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(80, 47)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)

    edit(folder, change)
    with pytest.raises(ModelError) as refused:
        load(folder)
    for part in (
        "missing: model.layers.0.self_attn.k_proj.weight, model.norm.weight.",
        "unexpected: model.layers.9.mlp.up_proj.weight in model.safetensors.",
        "model.layers.1.mlp.gate_proj.weight is [80, 47], but must be [80, 48] (in model.safetens",
        "model.layers.1.mlp.up_proj.weight is saved as I8",
        "Download the checkpoint again",
    ):
        assert part in str(refused.value)


def test_known_derived_tensors_and_a_second_copy_of_a_tied_head_are_ignored(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    tied = make_checkpoint(tie_word_embeddings=True)
    copy = shutil.copytree(tied.folder, tmp_path / "tied")
    edit(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit(copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load(copy)


def test_a_missing_untied_head_is_named(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"missing: lm_head\.weight"):
        load(folder)


def test_a_checkpoint_without_the_prefix_of_the_body_loads(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    tied = make_checkpoint(tie_word_embeddings=True)
    copy = shutil.copytree(tied.folder, tmp_path / "bare")
    tensors = load_file(copy / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, copy / "model.safetensors")
    backend, whole = load(copy), tied.load()
    weights = (b._runner._model.model.embed_tokens.weight for b in (backend, whole))
    assert torch.equal(*weights)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickled_weights_are_refused_and_never_opened(folder: Path, suffix: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / f"pytorch_model{suffix}").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with pytest.raises(ModelError, match="convert the checkpoint to safetensors"):
        load(folder)


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(folder)


def test_several_files_without_an_index_are_not_guessed_at(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ModelError, match=r"several weight files \(a\.safe.*, b\.safe"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "weights.bin",
        "",
        7,
        "a\\b",
        "..",
    ],
)
def test_an_index_may_only_name_weight_files_of_its_folder(folder: Path, name: Any) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match="is not the name of a weight file"):
        load(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_that_names_nothing_is_refused(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="index"):
        load(folder)


def test_an_index_that_names_an_absent_file_is_refused(folder: Path) -> None:
    index = {"weight_map": {"x": "model-00002.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks weight files .* model-00002\.safetensors"):
        load(folder)


def test_a_tensor_in_two_shards_is_reported(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    index = {"weight_map": {"x": "model.safetensors", "y": "model-2.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lm_head\.weight is there twice"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"{"])
def test_a_damaged_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_loading_reports_progress_that_only_grows(make_checkpoint: Any) -> None:
    sharded = make_checkpoint(shard_size="40KB")
    seen: list[LoadProgress] = []
    load_backend(BackendOptions(sharded.folder, num_blocks=16), seen.append)
    for stage in ("load", "warm-up"):
        fractions = [progress.fraction for progress in seen if progress.stage == stage]
        assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert len({progress.detail for progress in seen if progress.stage == "load"}) > 3


def test_weights_that_cannot_be_allocated_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("vllm_models.weights.load._materialise", no_memory)
    with pytest.raises(DeviceError, match=r"do not fit: .*allocate"):
        load(folder)


def test_a_shape_that_the_weights_do_not_have_is_refused_before_anything_is_allocated(
    folder: Path,
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 2**45}))
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \[128, 48\], but must be"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2**60}))
    with pytest.raises(ModelError, match=r"config\.json: no model has such sizes"):
        load(folder)
