"""Tensor names in both directions, checked against the tables of the `gguf` package."""

from __future__ import annotations

import gguf
import pytest
import torch
from vllm_models.gguf.architectures import ARCHITECTURES, GgufArchitecture
from vllm_models.gguf.names import from_gguf, from_hf
from vllm_models.gguf.rearrange import halves_from_pairs, pairs_from_halves
from vllm_models.registry import supported_architectures

BY_TYPE = {row.model_type: row for row in ARCHITECTURES}
KNOWN = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
# What converters rename before they look a name up.
SPELLINGS = {
    "block_sparse_moe.experts.{}.": "feed_forward.experts.",
    "experts.{}.": "experts.",
    "e_score_correction_bias": "e_score_correction.bias",
    "layer_scalar": "layer_scalar.weight",
    "self_attn.sinks": "self_attn.sinks.weight",
    "experts.gate_up_proj": "experts.gate_up_proj.weight",
    "experts.down_proj": "experts.down_proj.weight",
}
# What the package's tables lack: heads that are always tied, layers without experts in models
# that usually have some in all, and names that converters spell out.
_MLP = {"ffn_gate", "ffn_up", "ffn_down"}
BEYOND = {
    "gemma2": {"output"},
    "qwen2_moe": _MLP,
    "qwen3_moe": _MLP,
    "gemma4_text": {"ffn_gate_inp.scale", "ffn_down_exps.scale"},
}


def rows() -> list[tuple[GgufArchitecture, str]]:
    return [(row, stem) for row in ARCHITECTURES for stem in (*row.top, *row.tensors)]


def full_name(row: GgufArchitecture, stem: str) -> str:
    whole = stem if "." in stem else f"{stem}.weight"
    return whole if stem in row.top else f"blk.3.{whole}"


@pytest.mark.parametrize(
    ("row", "stem"),
    [entry for entry in rows() if entry[1] not in BEYOND.get(entry[0].model_type, ())],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_the_gguf_package_knows_every_name_as_the_same(row: GgufArchitecture, stem: str) -> None:
    name = full_name(row, stem)
    ours = from_gguf(row, name)
    assert ours is not None
    spelled = ours.hf
    for old, new in SPELLINGS.items():
        if spelled.endswith(old) or (old.endswith(".") and old in spelled):
            spelled = spelled.replace(old, new)
            if new.startswith("feed_forward"):
                spelled = spelled.removeprefix("model.")
            break
    table = gguf.get_tensor_name_map(KNOWN[row.name], 4)
    assert table.get_name(spelled, (".weight", ".bias", ".scale")) == name


@pytest.mark.parametrize(("row", "stem"), rows(), ids=lambda v: getattr(v, "model_type", v))
def test_every_name_comes_back(row: GgufArchitecture, stem: str) -> None:
    name = full_name(row, stem)
    there = from_gguf(row, name)
    assert there is not None
    back = from_hf(row, there.hf.format(7))
    assert back is not None
    assert back._replace(expert=None) == there
    assert back.expert == (7 if there.is_stack else None)


def test_every_architecture_can_be_loaded() -> None:
    assert {row.model_class for row in ARCHITECTURES} <= set(supported_architectures())


@pytest.mark.parametrize(
    ("model_type", "gguf_name", "hf_name"),
    [
        ("llama", "token_embd.weight", "model.embed_tokens.weight"),
        ("llama", "output.weight", "lm_head.weight"),
        ("llama", "blk.11.attn_q.bias", "model.layers.11.self_attn.q_proj.bias"),
        ("qwen3", "blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
        ("mixtral", "blk.2.ffn_gate_inp.weight", "model.layers.2.block_sparse_moe.gate.weight"),
    ],
)
def test_names_of_plain_tensors(model_type: str, gguf_name: str, hf_name: str) -> None:
    there = from_gguf(BY_TYPE[model_type], gguf_name)
    back = from_hf(BY_TYPE[model_type], hf_name)
    assert there == back and there is not None
    assert (there.gguf, there.hf, there.is_stack) == (gguf_name, hf_name, False)


def test_experts_are_parts_of_one_tensor() -> None:
    name = from_hf(BY_TYPE["qwen3_moe"], "model.layers.5.mlp.experts.31.up_proj.weight")
    assert name is not None and name.is_stack
    assert (name.gguf, name.expert, name.layer) == ("blk.5.ffn_up_exps.weight", 31, 5)


@pytest.mark.parametrize(
    "name",
    ["blk.0.attn_sinks.weight", "blk.x.attn_q.weight", "blk.00.attn_q.weight", "attn_q.weight", ""],
)
def test_what_an_architecture_does_not_have_has_no_name(name: str) -> None:
    assert from_gguf(BY_TYPE["llama"], name) is None


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.x", "x.weight", ""]
)
def test_what_gguf_does_not_have_has_no_name(name: str) -> None:
    assert from_hf(BY_TYPE["llama"], name) is None


def test_neighbours_in_gguf_are_the_halves_of_a_head() -> None:
    halves = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])[:, None]  # two heads of width 4
    pairs = pairs_from_halves(halves, 2)
    assert pairs[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert torch.equal(halves_from_pairs(pairs, 2), halves)


@pytest.mark.parametrize(("num_heads", "width"), [(1, 2), (3, 6), (4, 16)])
@pytest.mark.parametrize("tail", [(), (5,), (2, 3)])
def test_rearranged_rows_come_back(num_heads: int, width: int, tail: tuple[int, ...]) -> None:
    rows = torch.arange(num_heads * width).view(-1, *(1,) * len(tail)).expand(-1, *tail)
    there = pairs_from_halves(rows, num_heads)
    assert torch.equal(halves_from_pairs(there, num_heads), rows)
    head = there.reshape(len(there), -1)[:width, 0].tolist()
    half = width // 2
    assert head == [i // 2 + half * (i % 2) for i in range(width)]
