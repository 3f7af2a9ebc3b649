"""Architectures from this package and from others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm_models import BackendOptions, load_backend, register_architecture, supported_architectures
from vllm_models import registry as registry_module
from vllm_models.architectures.llama import LlamaForCausalLM
from vllm_traits import Batch, Chunk, ModelError, SamplingParams, Start


class UpsideDown(LlamaForCausalLM):
    """An architecture from outside: the least likely token of Llama is its most likely one."""

    def logits(self, hidden: Any) -> Any:
        return -super().logits(hidden)


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_ARCHITECTURES", dict(registry_module._ARCHITECTURES))


def renamed(checkpoint: Any, folder: Path, architecture: str) -> Path:
    shutil.copytree(checkpoint.folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def first_token(folder: Path) -> int:
    backend = load_backend(BackendOptions(folder, dtype="f32", num_blocks=16))
    start = Start(9, (5, 6, 7), SamplingParams(temperature=0.0), num_prompt_tokens=3)
    output = backend.forward(Batch((Chunk(9, 0, 3, (0,)),), (start,))).result()
    return output.token_ids[9][0]


def test_an_architecture_registered_from_outside_runs(small: Any, tmp_path: Path) -> None:
    register_architecture("UpsideDownForCausalLM", UpsideDown)
    folder = renamed(small, tmp_path / "model", "UpsideDownForCausalLM")
    assert first_token(folder) == int(small.logits((5, 6, 7))[-1].argmin())
    assert "UpsideDownForCausalLM" in supported_architectures()


def test_an_architecture_of_an_entry_point_runs(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "outside"
    (package / "upside-1.dist-info").mkdir(parents=True)
    (package / "upside-1.dist-info" / "METADATA").write_text("Name: upside\nVersion: 1\n")
    (package / "upside-1.dist-info" / "entry_points.txt").write_text(
        "[vllm_lite.architectures]\nEntryForCausalLM = upside_down:Model\n"
    )
    (package / "upside_down.py").write_text(
        "from vllm_models.architectures.llama import LlamaForCausalLM\n"
        "class Model(LlamaForCausalLM):\n"
        "    def logits(self, hidden):\n"
        "        return -super().logits(hidden)\n"
    )
    monkeypatch.syspath_prepend(str(package))
    folder = renamed(small, tmp_path / "model", "EntryForCausalLM")
    assert first_token(folder) == int(small.logits((5, 6, 7))[-1].argmin())
    assert "EntryForCausalLM" in supported_architectures()


def test_an_unknown_architecture_is_answered_with_the_supported_ones(
    small: Any, tmp_path: Path
) -> None:
    folder = renamed(small, tmp_path / "model", "BertModel")
    with pytest.raises(
        ModelError, match=r"BertModel.*LlamaForCausalLM, MistralForCausalLM, Mixtral"
    ):
        load_backend(BackendOptions(folder))


@pytest.mark.parametrize("target", ["no.such.module:Model", "json:NoSuchClass", "json:dumps", dict])
def test_a_registration_that_leads_nowhere_is_named(
    small: Any, tmp_path: Path, target: Any
) -> None:
    register_architecture("Nowhere", target)
    with pytest.raises(ModelError, match="Nowhere"):
        load_backend(BackendOptions(renamed(small, tmp_path / "model", "Nowhere")))


@pytest.mark.parametrize("target", ["module", ":Class", "module:", ""])
def test_a_target_is_module_and_class(target: str) -> None:
    with pytest.raises(ValueError, match="module:Class"):
        register_architecture("Broken", target)
