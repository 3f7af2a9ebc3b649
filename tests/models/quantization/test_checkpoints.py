"""Whole checkpoints in every format generate what HF generates with the dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm_models.native.library import library
from vllm_traits import Batch, Chunk, ModelError, SamplingParams, Start

from tests.models.quantization import packers
from tests.models.quantization.packers import Packer

native = pytest.mark.skipif(library() is None, reason="there is no C compiler")
WEIGHTS = "model.safetensors"
PROMPT = (5, 17, 99, 3, 42, 7, 64)
NUM_TOKENS = 12
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
INTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
FORMATS: dict[str, tuple[dict[str, Any], Packer]] = {
    "gptq": (GPTQ | {"desc_act": True}, lambda w: packers.gptq(w, order_seed=len(w))),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, lambda w: packers.marlin(w, 32)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, packers.awq),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [48, 32]},
        lambda w: packers.fp8(w, "48x32", "weight_scale_inv"),
    ),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": INTS}},
        },
        lambda w: packers.compressed_integers(w, symmetric=False),
    ),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda w: packers.bitsandbytes(w, nested=True),
    ),
}


def write_packed(
    plain: Path,
    folder: Path,
    config: dict[str, Any],
    pack: Packer,
    own: Mapping[str, Packer | None] | None = None,
) -> dict[str, torch.Tensor]:
    """A packed copy of a checkpoint; returns all weights as numbers.

    Args:
        plain: The checkpoint.
        folder: Of the copy.
        config: Of the format.
        pack: For layers.
        own: Instead, for those with a key in their names; None leaves them as they are.
    """
    shutil.copytree(plain, folder)
    packed: dict[str, torch.Tensor] = {}
    numbers = load_file(plain / WEIGHTS)
    for name, tensor in list(numbers.items()):
        layer = name.removesuffix(".weight")
        given = [other for key, other in (own or {}).items() if key in name]
        chosen = (*given, pack)[0] if layer.endswith("_proj") else None
        if chosen is None:
            packed[name] = tensor
            continue
        tensors, weight = chosen(tensor.numpy())
        packed |= {f"{layer}.{suffix}": saved.contiguous() for suffix, saved in tensors.items()}
        numbers[name] = torch.from_numpy(weight).contiguous()
    save_file(packed, folder / WEIGHTS)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return numbers


def greedy(backend: Any, num_tokens: int) -> tuple[int, ...]:
    params = SamplingParams(temperature=0.0)
    start = Start(0, PROMPT, params, num_prompt_tokens=len(PROMPT))
    chunk = Chunk(0, 0, len(PROMPT), tuple(range(8)))
    tokens: list[int] = []
    batch = Batch((chunk,), (start,))
    for position in range(len(PROMPT), len(PROMPT) + num_tokens):
        tokens += backend.forward(batch).result().token_ids[0]
        batch = Batch((Chunk(0, position, 1),))
    return tuple(tokens)


@pytest.fixture(scope="session", params=["llama", "qwen3_moe"])
def plain(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Any]) -> Any:
    more = EXPERTS if request.param == "qwen3_moe" else {}
    return make_checkpoint(request.param, **SHAPE, **more)


@pytest.mark.usefixtures("torch_products")
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_are_those_of_the_dequantized_weights(
    plain: Any, tmp_path: Path, name: str
) -> None:
    config, pack = FORMATS[name]
    numbers = write_packed(plain.folder, tmp_path / "packed", config, pack)
    reference = shutil.copytree(plain.folder, tmp_path / "numbers")
    save_file(numbers, reference / WEIGHTS, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    copy = type(plain)(tmp_path / "packed", model.eval())
    assert greedy(copy.load(), NUM_TOKENS) == copy.greedy(PROMPT, NUM_TOKENS)


@native
@pytest.mark.parametrize("name", ["gptq", "marlin", "awq", "compressed-tensors"])
def test_integers_are_multiplied_by_the_kernels_alone(
    plain: Any, tmp_path: Path, name: str
) -> None:
    config, pack = FORMATS[name]
    numbers = write_packed(plain.folder, tmp_path / "packed", config, pack)
    reference = shutil.copytree(plain.folder, tmp_path / "numbers")
    save_file(numbers, reference / WEIGHTS, metadata={"format": "pt"})
    backend = type(plain)(tmp_path / "packed", None).load(block_size=16)
    assert backend.loaded.batch_dependence == ()
    exact = type(plain)(reference, None).load(block_size=16)
    first = [greedy(one, 1) for one in (backend, exact)]
    assert first[0] == first[1]  # activations of 8 bits may differ later


@pytest.mark.usefixtures("torch_products")
def test_layers_that_were_not_converted_are_loaded_as_they_are(plain: Any, tmp_path: Path) -> None:
    config, pack = FORMATS["gptq"]
    config = config | {"modules_to_not_convert": ["model.layers.0.self_attn.v_proj", "layers.1"]}
    folder = tmp_path / "packed"
    numbers = write_packed(plain.folder, folder, config, pack, {"v_proj": None})
    reference = shutil.copytree(plain.folder, tmp_path / "numbers")
    save_file(numbers, reference / WEIGHTS, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    copy = type(plain)(folder, model.eval())
    assert greedy(copy.load(), NUM_TOKENS) == copy.greedy(PROMPT, NUM_TOKENS)


def test_errors_name_the_file_and_the_tensor(plain: Any, tmp_path: Path) -> None:
    config, pack = FORMATS["gptq"]
    folder = tmp_path / "packed"
    write_packed(plain.folder, folder, config, pack)
    tensors = load_file(folder / WEIGHTS)
    damaged = "model.layers.1.self_attn.k_proj"
    tensors[f"{damaged}.scales"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    load = type(plain)(folder, None).load
    with pytest.raises(ModelError) as refused:
        load()
    assert f"{folder / WEIGHTS}: {damaged}.scales holds values that are not finite." in str(
        refused.value
    )
    tensors[f"{damaged}.scales"] = tensors[f"{damaged}.scales"][:1].contiguous()
    del tensors[f"{damaged}.qzeros"]
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ModelError) as refused:
        load()
    assert f"missing: {damaged}.qzeros" in str(refused.value)
    assert f"{damaged}.scales is [1, 64], but must be [2, 64]" in str(refused.value)
