"""Hugging Face checkpoints written as GGUF by the `gguf` package, independently of our own names.

Tensor names come from the package's tables, the order of rows from the formula that converters
follow, and the metadata is written key by key as converters do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_models.gguf.architectures import ARCHITECTURES
from vllm_models.gguf.names import from_hf
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.gguf.types import GgmlType

Kind = gguf.GGMLQuantizationType
Arrays = dict[str, np.ndarray]
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Recipe:
    """How converters write one kind of model.

    Attributes:
        architecture: In GGUF.
        metadata: Adds what is beyond the common keys; called with the writer and the HF config.
        paired: Rows of q and k are interleaved.
        offset: Norm weights are stored with 1 added.
        tensors: Tensors beyond the checkpoint's, from the config.
        rename: HF names that the package's tables do not know as they are.
        convert: Changes the checkpoint's tensors first; may give some their GGUF names.
        head_keys: The width of heads is written as for most models.
    """

    architecture: gguf.MODEL_ARCH
    metadata: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None
    paired: bool = False
    offset: bool = False
    tensors: Callable[[Any], Arrays] = lambda config: {}
    rename: Mapping[str, str] = field(default_factory=dict)
    convert: Callable[[Arrays, Any], Arrays] = lambda arrays, config: arrays
    head_keys: bool = True


def mixture(writer: gguf.GGUFWriter, config: Any) -> None:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if width := getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(width)
    if width := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(width)


def window(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)


def mixtral(writer: gguf.GGUFWriter, config: Any) -> None:
    mixture(writer, config)
    window(writer, config)


def llama3_factors(config: Any) -> Arrays:
    """Per pair of rotated elements, by what its wavelength is stretched."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return {}
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    wavelengths = 2 * np.pi * rope["rope_theta"] ** exponents
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < original / high, 1.0, between)
    factors = np.where(wavelengths > original / low, factor, factors)
    return {"rope_freqs.weight": factors.astype(np.float32)}


def partial_rotation(writer: gguf.GGUFWriter, config: Any) -> None:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(width * share))


def phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    partial_rotation(writer, config)
    writer.add_sliding_window(config.sliding_window or 0)
    rope = config.rope_parameters
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(stretch) / np.log(original)))


def phi3_factors(config: Any) -> Arrays:
    rope = config.rope_parameters
    if rope["rope_type"] != "longrope":
        return {}
    return {
        f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
        for name in ("long", "short")
    }


def layer_kinds(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def grouped_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def glm4_moe(writer: gguf.GGUFWriter, config: Any) -> None:
    grouped_experts(writer, config)
    partial_rotation(writer, config)


def deepseek(writer: gguf.GGUFWriter, config: Any) -> None:
    grouped_experts(writer, config)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if scale := config.rope_parameters.get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)


def latent_halves(arrays: Arrays, config: Any) -> Arrays:
    """Converters part what makes keys from what makes values, and turn the former around."""
    found: Arrays = {}
    for name, array in arrays.items():
        if "kv_b_proj" not in name:
            found[name] = array
            continue
        width = config.qk_nope_head_dim + config.v_head_dim
        heads = array.reshape(config.num_attention_heads, width, config.kv_lora_rank)
        keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        found[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
        found[name.replace("kv_b_proj", "v_b_proj")] = values
    return found


def gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    mixture(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)


def parted_experts(arrays: Arrays, config: Any) -> Arrays:
    """GPT-OSS interleaves gate and up, and multiplies from the other side."""
    found: Arrays = {}
    for name, array in arrays.items():
        layer = f"blk.{name.split('.')[2]}." if ".experts." in name else ""
        suffix = "bias" if name.endswith("_bias") else "weight"
        turned = array.swapaxes(1, 2) if array.ndim == 3 else array
        if "experts.gate_up_proj" in name:
            found[f"{layer}ffn_gate_exps.{suffix}"] = turned[:, ::2]
            found[f"{layer}ffn_up_exps.{suffix}"] = turned[:, 1::2]
        elif "experts.down_proj" in name:
            found[f"{layer}ffn_down_exps.{suffix}"] = turned
        else:
            found[name] = array
    return found


def gemma4(writer: gguf.GGUFWriter, config: Any) -> None:
    layers = list(config.per_layer_config)
    near = [kind == "sliding_attention" for kind in config.layer_types]
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(near)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    narrow, wide = (layers[near.index(is_near)].head_dim for is_near in (True, False))
    for add, width in (
        (writer.add_key_length, wide),
        (writer.add_value_length, wide),
        (writer.add_key_length_swa, narrow),
        (writer.add_value_length_swa, narrow),
        (writer.add_rope_dimension_count, wide),
        (writer.add_rope_dimension_count_swa, narrow),
    ):
        add(width)
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    own = len(layers) - config.num_kv_shared_layers
    wider = 2 if config.use_double_wide_mlp else 1
    width = config.intermediate_size
    writer.add_feed_forward_length([width] * own + [width * wider] * config.num_kv_shared_layers)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def still_pairs(config: Any) -> Arrays:
    """Converters slow the pairs that are not rotated down to nothing."""
    pairs = max(layer.head_dim for layer in config.per_layer_config) // 2
    share = config.rope_parameters["full_attention"]["partial_rotary_factor"]
    factors = np.full(pairs, 1e30, np.float32)
    factors[: int(pairs * share)] = 1.0
    return {"rope_freqs.weight": factors}


def gemma4_names(arrays: Arrays, config: Any) -> Arrays:
    endings = {
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "layer_scalar": "layer_output_scale.weight",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
    }
    found: Arrays = {}
    for name, array in arrays.items():
        new = next((e for old, e in endings.items() if name.endswith(f".{old}")), None)
        found[f"blk.{name.split('.')[2]}.{new}" if new else name] = array
    return found


ARCH = gguf.MODEL_ARCH
RECIPES = {
    "llama": Recipe(ARCH.LLAMA, paired=True, tensors=llama3_factors),
    "mistral": Recipe(ARCH.LLAMA, window, paired=True),
    "mixtral": Recipe(
        ARCH.LLAMA,
        mixtral,
        paired=True,
        rename={"block_sparse_moe.experts": "feed_forward.experts"},
    ),
    "qwen2": Recipe(ARCH.QWEN2),
    "qwen2_moe": Recipe(ARCH.QWEN2MOE, mixture),
    "qwen3": Recipe(ARCH.QWEN3),
    "qwen3_moe": Recipe(ARCH.QWEN3MOE, mixture),
    "phi3": Recipe(ARCH.PHI3, phi3, tensors=phi3_factors),
    "olmo2": Recipe(ARCH.OLMO2),
    "olmo3": Recipe(ARCH.OLMO2, layer_kinds),
    "glm4": Recipe(ARCH.GLM4, partial_rotation),
    "glm4_moe": Recipe(
        ARCH.GLM4_MOE, glm4_moe, rename={"e_score_correction_bias": "e_score_correction.bias"}
    ),
    "deepseek_v3": Recipe(
        ARCH.DEEPSEEK2,
        deepseek,
        rename={"e_score_correction_bias": "e_score_correction.bias"},
        convert=latent_halves,
        head_keys=False,
    ),
    "gemma2": Recipe(ARCH.GEMMA2, gemma2, offset=True),
    "gemma3_text": Recipe(ARCH.GEMMA3, gemma3, offset=True),
    "gemma4_text": Recipe(
        ARCH.GEMMA4, gemma4, tensors=still_pairs, convert=gemma4_names, head_keys=False
    ),
    "gpt_oss": Recipe(
        ARCH.GPT_OSS, gpt_oss, rename={"sinks": "sinks.weight"}, convert=parted_experts
    ),
}


def pair_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """The formula of converters for the q and k of Llama."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def stacked(arrays: Arrays) -> Arrays:
    """With the experts of a layer as one array [E, ...]."""
    found: Arrays = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in arrays.items():
        part = EXPERT.fullmatch(name)
        if part is None:
            found[name] = array
        else:
            stacks.setdefault(f"{part[1]}.{part[3]}.weight", {})[int(part[2])] = array
    for name, experts in stacks.items():
        found[name] = np.stack([experts[index] for index in range(len(experts))])
    return found


def gguf_tensors(recipe: Recipe, config: Any, arrays: Arrays) -> Arrays:
    """The tensors of a file, from those of a checkpoint."""
    names = gguf.get_tensor_name_map(recipe.architecture, config.num_hidden_layers)
    found = dict(recipe.tensors(config))
    for name, array in stacked(recipe.convert(arrays, config)).items():
        known = name
        for old, new in recipe.rename.items():
            if old in known:
                known = known.replace(old, new)
                known = known.replace("model.layers", "layers") if "feed_forward" in new else known
        target = name if name.startswith("blk.") else names.get_name(known, (".weight", ".bias"))
        assert target is not None, name
        if recipe.paired and ".q_proj" in name:
            array = pair_rows(array, config.num_attention_heads)
        if recipe.paired and ".k_proj" in name:
            array = pair_rows(array, config.num_key_value_heads)
        if recipe.offset and "norm" in name:
            array = array + 1
        found[target] = array.squeeze() if array.size > 1 else array.reshape(1)
    return found


def add_common(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if not hasattr(config, "use_double_wide_mlp"):
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)


def add_heads(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)


def add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


ChooseKind = Callable[[str, np.ndarray], Kind]


def in_f32(name: str, array: np.ndarray) -> Kind:
    return Kind.F32


def held(array: np.ndarray, kind: Kind) -> np.ndarray:
    """The blocks of some weights; the package quantizes to the simpler types only."""
    if kind in (Kind.F32, Kind.F16, Kind.BF16, Kind.MXFP4):
        return gguf.quants.quantize(np.ascontiguousarray(array), kind)
    rows = torch.from_numpy(np.ascontiguousarray(array)).flatten(0, -2)
    return quantize(rows, GgmlType(kind)).numpy().reshape(*array.shape[:-1], -1)


@dataclass(frozen=True)
class Converter:
    """Writes checkpoints as GGUF.

    Attributes:
        new_folder: Makes an empty folder.
    """

    new_folder: Callable[[], Path]

    def write(self, checkpoint: Any, kind: ChooseKind = in_f32) -> Path:
        """A file whose matrices have the type that `kind` gives by their GGUF name."""
        config = checkpoint.model.config
        recipe = RECIPES[config.model_type]
        arrays = gguf_tensors(recipe, config, read_arrays(checkpoint))
        path = self.new_folder() / f"{config.model_type}.gguf"
        write_file(path, recipe, config, {n: (a, kind_of(n, a, kind)) for n, a in arrays.items()})
        return path

    def rounded(self, checkpoint: Any, kind: ChooseKind) -> Any:
        """The checkpoint with the weights that the blocks of such a file stand for."""
        config = checkpoint.model.config
        row = next(row for row in ARCHITECTURES if row.model_type == config.model_type)
        tensors = gguf_tensors(RECIPES[config.model_type], config, read_arrays(checkpoint))
        kinds = {name: kind_of(name, array, kind) for name, array in tensors.items()}
        numbers: Arrays = {}
        for name, array in read_arrays(checkpoint).items():
            there = from_hf(row, name)
            assert there is not None
            numbers[name] = gguf.quants.dequantize(
                held(array, kinds[there.gguf]), kinds[there.gguf]
            )
        return self.with_weights(checkpoint, numbers)

    def with_weights(self, checkpoint: Any, arrays: Arrays) -> Any:
        """The checkpoint with other weights."""
        folder = self.new_folder()
        for path in checkpoint.folder.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        tensors = {
            name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model = type(checkpoint.model).from_pretrained(folder, dtype=torch.float32).eval()
        return type(checkpoint)(folder, model)


def kind_of(name: str, array: np.ndarray, kind: ChooseKind) -> Kind:
    """Only matrices are ever quantized."""
    return kind(name, array) if array.ndim > 1 and name.endswith(".weight") else Kind.F32


def read_arrays(checkpoint: Any) -> Arrays:
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    arrays = {n: t.float().numpy() for file in files for n, t in load_file(file).items()}
    if checkpoint.model.config.tie_word_embeddings:
        arrays.pop("lm_head.weight", None)
    return arrays


def write_file(
    path: Path, recipe: Recipe, config: Any, tensors: Mapping[str, tuple[np.ndarray, Kind]]
) -> None:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[recipe.architecture])
    add_common(writer, config)
    add_rope(writer, config)
    if recipe.head_keys:
        add_heads(writer, config)
    recipe.metadata(writer, config)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(held(array, kind)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Converter:
    """Writes files of GGUF."""
    return Converter(lambda: tmp_path_factory.mktemp("gguf"))
