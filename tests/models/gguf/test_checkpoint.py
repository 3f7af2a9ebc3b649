"""A GGUF file as a checkpoint: names, views of the file, stacks, split sets and the digest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from vllm_models import BackendOptions, load_backend
from vllm_models.gguf.checkpoint import GgufCheckpoint
from vllm_models.weights.checkpoint import open_checkpoint
from vllm_models.weights.saved import SavedTensor
from vllm_traits import ModelError

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def q8(name: str, array: np.ndarray) -> Kind:
    return Kind.Q8_0 if array.shape[-1] % 32 == 0 else Kind.F32


def by_name(path: Path) -> dict[str, SavedTensor]:
    return {tensor.name: tensor for tensor in open_checkpoint(path).tensors()}


@pytest.fixture(scope="module")
def mixture(make_checkpoint: Any, converter: Any) -> tuple[Any, Path]:
    checkpoint = make_checkpoint("qwen3_moe", norm_topk_prob=True, hidden_size=64, **EXPERTS)
    return checkpoint, converter.write(checkpoint, q8)


@pytest.fixture(scope="module")
def llama(make_checkpoint: Any, converter: Any) -> tuple[Any, Path]:
    checkpoint = make_checkpoint(hidden_size=64, attention_bias=True)
    return checkpoint, converter.write(checkpoint, q8)


def test_every_tensor_of_the_checkpoint_is_there_under_its_name(mixture: tuple[Any, Path]) -> None:
    checkpoint, path = mixture
    expected = {t.name: t.shape for t in open_checkpoint(checkpoint.folder).tensors()}
    assert {name: tensor.shape for name, tensor in by_name(path).items()} == expected


def test_an_expert_is_its_part_of_the_stack(mixture: tuple[Any, Path]) -> None:
    checkpoint, path = mixture
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    found = by_name(path)[name]
    original = {t.name: t for t in open_checkpoint(checkpoint.folder).tensors()}[name].read()
    assert (found.shape, found.kind, found.num_bytes) == ((32, 64), "Q8_0", 32 * 2 * 34)
    expected = gguf.quants.quantize(original.numpy(), Kind.Q8_0)
    assert np.array_equal(found.read().numpy(), expected)


def test_quantized_rows_of_queries_and_their_biases_are_put_in_order(
    llama: tuple[Any, Path],
) -> None:
    checkpoint, path = llama
    found = by_name(path)
    originals = {t.name: t.read() for t in open_checkpoint(checkpoint.folder).tensors()}
    for name in ("q_proj", "k_proj"):
        weight, bias = (f"model.layers.1.self_attn.{name}.{kind}" for kind in ("weight", "bias"))
        expected = gguf.quants.quantize(originals[weight].numpy(), Kind.Q8_0)
        assert np.array_equal(found[weight].read().numpy(), expected)
        assert torch.equal(found[bias].read(), originals[bias])


def test_plain_tensors_are_views_of_the_file(llama: tuple[Any, Path]) -> None:
    tensors = {tensor.name: tensor for tensor in GgufCheckpoint(llama[1]).tensors()}
    tensor = tensors["model.norm.weight"]
    assert tensor.read().data_ptr() == tensor.read().data_ptr()
    tensor.release()
    assert tensor.read().shape == (64,)


def rewritten(
    path: Path, target: Path, *, drop: str = "", extra: dict[str, Any] | None = None
) -> Path:
    """A copy without a tensor, or with tensors more."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        if tensor.name != drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def plain(make_checkpoint: Any, converter: Any) -> Path:
    return converter.write(make_checkpoint())


def test_a_tensor_that_is_missing_is_named_as_it_is_in_hugging_face(
    plain: Path, tmp_path: Path
) -> None:
    path = rewritten(plain, tmp_path / "x.gguf", drop="blk.1.attn_k.weight")
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.weight"):
        load_backend(BackendOptions(path, num_blocks=8))


def test_a_tensor_that_means_nothing_is_refused(plain: Path, tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    path = rewritten(plain, tmp_path / "x.gguf", extra=extra)
    with pytest.raises(ModelError, match=r"unexpected: blk\.0\.attn_sinks\.weight"):
        load_backend(BackendOptions(path, num_blocks=8))


def test_derived_tensors_are_left_alone(plain: Path, tmp_path: Path) -> None:
    extra = {"blk.0.attn_rot_embd.weight": np.zeros(4, np.float32)}
    path = rewritten(plain, tmp_path / "x.gguf", extra=extra)
    assert by_name(path).keys() == by_name(plain).keys()


def test_rows_that_are_no_pairs_are_refused(plain: Path, tmp_path: Path) -> None:
    path = rewritten(
        plain,
        tmp_path / "x.gguf",
        drop="blk.0.attn_q.weight",
        extra={"blk.0.attn_q.weight": np.zeros((60, 48), np.float32)},
    )
    with pytest.raises(ModelError, match=r"x\.gguf: blk\.0\.attn_q\.weight has 60 rows"):
        by_name(path)["model.layers.0.self_attn.q_proj.weight"].read()


def test_a_stack_of_another_number_of_experts_is_refused(
    mixture: tuple[Any, Path], tmp_path: Path
) -> None:
    name = "blk.0.ffn_up_exps.weight"
    extra = {name: np.zeros((5, 32, 64), np.float32)}
    path = rewritten(mixture[1], tmp_path / "x.gguf", drop=name, extra=extra)
    with pytest.raises(ModelError, match=r"is \[5, 32, 64\], which is no stack of 6"):
        list(open_checkpoint(path).tensors())


def test_a_split_set_is_one_checkpoint(plain: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(
        tmp_path / "tiny.gguf", "llama", split_max_tensors=8, small_first_shard=False
    )
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = tmp_path / "tiny-00001-of-00003.gguf"
    one, parts = by_name(plain), by_name(first)
    assert one.keys() == parts.keys()
    assert len({tensor.source for tensor in parts.values()}) == 3
    for name, tensor in parts.items():
        assert torch.equal(tensor.read(), one[name].read())


def test_the_digest_follows_weights_and_metadata(
    plain: Path, llama: tuple[Any, Path], tmp_path: Path
) -> None:
    digest = open_checkpoint(plain).fingerprint()
    assert open_checkpoint(plain).fingerprint() == digest
    assert open_checkpoint(llama[1]).fingerprint() != digest
    changed = tmp_path / plain.name
    content = bytearray(plain.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert open_checkpoint(changed).fingerprint() != digest
    content[-1] ^= 1
    place = content.index(b"llama.context_length")
    content[place + len(b"llama.context_length") + 4] ^= 1
    changed.write_bytes(content)
    assert open_checkpoint(changed).fingerprint() != digest
