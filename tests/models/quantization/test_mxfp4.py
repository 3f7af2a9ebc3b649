"""MXFP4 experts: the same numbers as HF reads from them, and a checkpoint that generates alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from vllm_models.components.linear import Linear
from vllm_models.json_fields import JsonFields
from vllm_models.quantization.scheme import scheme_for
from vllm_models.weights.saved import SavedTensor
from vllm_traits import ModelError

from tests.models.quantization.test_checkpoints import NUM_TOKENS, PROMPT, greedy

pytestmark = pytest.mark.usefixtures("torch_products")

SHAPE = {
    "family": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 96,
    "sliding_window": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, R, C] -> blocks [E, R, C / 32, 16] and scales [E, R, C / 32]."""
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = groups / exponents.exp2()[..., None]
    codes = (scaled.abs()[..., None] - LEVELS).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = codes[..., ::2], codes[..., 1::2]
    return (low | high << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def of_numbers(tensor: torch.Tensor, name: str) -> SavedTensor:
    shape, size = tuple(tensor.shape), tensor.numel()
    return SavedTensor(name, shape, "U8", "a file", size, lambda: tensor, lambda: None)


def test_every_code_and_exponent_reads_as_hf_reads_it() -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (1, 40, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 190, (1, 40, 3), generator=generator, dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T

    layer = Linear(96, {"gate_proj": 24, "up_proj": 16})
    saved = {
        f"mlp.{part}.{suffix}": of_numbers(tensor[0, rows], f"mlp.{part}.{suffix}")
        for part, rows in (("gate_proj", slice(24)), ("up_proj", slice(24, 40)))
        for suffix, tensor in (("blocks", blocks), ("scales", scales))
    }
    scheme = scheme_for(JsonFields({"quantization_config": {"quant_method": "mxfp4"}}, "here"))
    assert scheme is not None
    method = scheme.method(["mlp.gate_proj", "mlp.up_proj"], layer, saved)
    assert method is not None
    layer.use(method)
    for name, place in layer.places("mlp.gate_up_proj"):
        assert saved[name].shape == place.shape and saved[name].kind in place.kinds
        place.take(saved[name].read())
    method.pack(layer)
    assert torch.equal(method.dequantize(layer), wanted)


@pytest.fixture(scope="module")
def plain(make_checkpoint: Any) -> Any:
    return make_checkpoint(**SHAPE)


def write_packed(plain: Any, folder: Path) -> Any:
    """A packed copy; the HF model gets the numbers that are left."""
    shutil.copytree(plain.folder, folder)
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = tensor
            continue
        blocks, scales = pack(tensor.transpose(1, 2))
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        plain.model.get_parameter(name).data.copy_(numbers)
    save_file(packed, folder / "model.safetensors")
    path = folder / "config.json"
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    return type(plain)(folder, plain.model)


def test_a_checkpoint_with_packed_experts_generates_as_hf_does(plain: Any, tmp_path: Path) -> None:
    packed = write_packed(plain, tmp_path / "packed")
    assert greedy(packed.load(), NUM_TOKENS) == packed.greedy(PROMPT, NUM_TOKENS)


def test_blocks_without_their_scales_are_refused_by_name(plain: Any, tmp_path: Path) -> None:
    packed = write_packed(plain, tmp_path / "packed")
    path = packed.folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.0\.down_proj\.scales"):
        packed.load()
