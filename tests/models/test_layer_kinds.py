"""Models whose layers differ: what they keep, what is said about it, and how they are published."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from vllm_models import BackendOptions, load_backend
from vllm_models.architectures.gemma4 import Gemma4ForCausalLM
from vllm_traits import Batch, Chunk, ModelError, SamplingParams, Start

PROMPT = (5, 17, 99, 3, 42, 7, 64, 30, 12, 77, 101, 8)
GEMMA4 = {
    "family": "gemma4",
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
    "global_head_dim": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "num_kv_shared_layers": 2,
}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "initializer_range": 0.4,
    "eos_token_id": 9,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def small_gemma3() -> Any:
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def small_gemma4() -> Any:
    text = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    config = transformers.Gemma4Config(
        text_config=TEXT | text | {"global_head_dim": 32},
        vision_config=VISION | {"num_key_value_heads": 2, "head_dim": 16},
        audio_config=None,
    )
    return transformers.Gemma4ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [small_gemma3, small_gemma4])
def test_the_text_part_of_a_multimodal_checkpoint_is_a_model(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = make().eval()
    model.save_pretrained(tmp_path)
    backend = load_backend(
        BackendOptions(tmp_path, dtype="f32", device="cpu", block_size=4, num_blocks=16)
    )
    assert backend.info.eos_token_ids == {9}
    params = SamplingParams(temperature=0.0, logprobs=128)
    start = Start(0, PROMPT, params, num_prompt_tokens=len(PROMPT))
    chunk = Chunk(0, 0, len(PROMPT), tuple(range(6)))
    output = backend.forward(Batch((chunk,), (start,))).result()
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert output.token_ids[0] == (int(wanted.argmax()),)
    top = dict(output.logprobs[0][0].top)
    got = torch.tensor([top[token] for token in range(128)])
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def gemma4(make_checkpoint: Any) -> Any:
    return make_checkpoint(**GEMMA4)


def test_layers_of_one_shape_and_window_are_a_group(gemma4: Any) -> None:
    backend = gemma4.load(block_size=8, max_model_len=60)
    near, far = backend.info.kv_groups
    assert (near.name, near.layers, near.window) == ("sliding", (0, 1, 3), 6)
    assert (far.name, far.layers, far.window) == ("full", (2,), 0)
    assert (near.num_kv_heads, near.key_dim, near.value_dim) == (2, 16, 16)
    assert (far.num_kv_heads, far.key_dim, far.value_dim) == (1, 32, 32)
    assert near.bytes_per_block == 3 * 8 * 2 * (16 + 16) * 4
    assert far.bytes_per_block == 1 * 8 * 1 * (32 + 32) * 4
    assert backend.memory.bytes_per_block == near.bytes_per_block + far.bytes_per_block


def test_kv_that_leaves_the_window_is_reported_as_never_read_again(gemma4: Any) -> None:
    (note,) = gemma4.load(max_model_len=60).memory.notes
    assert note == (
        "Layers with a window keep the KV of whole sequences: at 60 tokens, 68% of a sequence's "
        "KV memory is never read again."
    )
    assert gemma4.load(max_model_len=6).memory.notes == ()


def changed(checkpoint: Any, folder: Path, **changes: Any) -> Any:
    """The same weights under another configuration."""
    shutil.copytree(checkpoint.folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return replace(checkpoint, folder=folder)


def test_the_layout_of_every_group_is_part_of_the_fingerprint(
    gemma4: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gemma4.load()
    found = {before.info.fingerprint}
    kinds = Gemma4ForCausalLM.kv_layers(before.loaded.config)
    for other in (
        (*kinds[:-1], kinds[-1]._replace(shared_with=None)),
        (kinds[0], kinds[1]._replace(window=9), *kinds[2:]),
        (*kinds[:4], kinds[4]._replace(shared_with=None), kinds[5]),
    ):
        kept = staticmethod(lambda config, other=other: other)
        monkeypatch.setattr(Gemma4ForCausalLM, "kv_layers", kept)
        found.add(gemma4.load().info.fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_kv_shared_layers": 6}, "no KV to share"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input 100"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"sliding_window": None}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 5}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ({"hidden_activation": "relu"}, "hidden_activation"),
        ({"enable_moe_block": True, "num_experts": 2}, "moe_intermediate_size"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused_by_name(
    gemma4: Any, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        changed(gemma4, tmp_path / "changed", **changes).load()
