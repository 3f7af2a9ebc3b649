"""What a checkpoint is and whether it fits this machine, told from headers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_models.components.decoder import Decoder
from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.device import free_memory, pick_device, pick_dtype
from vllm_models.quantization.scheme import scheme_for
from vllm_models.registry import find_architecture
from vllm_models.runner.kv import bytes_per_token, kv_dtype
from vllm_models.weights.checkpoint import open_checkpoint
from vllm_models.weights.load import plan_model
from vllm_models.weights.saved import SavedTensor

GROUPS = ("embedding", "attention", "experts", "feed-forward", "norms", "output head", "other")


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a checkpoint that do the same work.

    Attributes:
        name: One of `GROUPS`.
        num_tensors: How many.
        num_bytes: Size in the files.
        kinds: Types with the bytes each takes, largest first.
    """

    name: str
    num_tensors: int
    num_bytes: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class Description:
    """A checkpoint, before anything is loaded.

    Attributes:
        path: Folder or file.
        format: "safetensors", "GGUF", or the name of the quantization.
        config: Its shape.
        num_parameters: Weights of the model, a tied head counted once.
        weight_bytes: Size in the files, and in memory unless quantized at load.
        groups: What takes how much.
        dtype: Element type of activations on this device.
        kv_dtype: What is stored of keys and values.
        kv_bytes_per_token: In all layers together.
        device: Where it would run.
        free_bytes: Memory that is free there now.
    """

    path: Path
    format: str
    config: ModelConfig
    num_parameters: int
    weight_bytes: int
    groups: tuple[TensorGroup, ...]
    dtype: str
    kv_dtype: str
    kv_bytes_per_token: int
    device: str
    free_bytes: int

    @property
    def tokens_that_fit(self) -> int:
        """Positions of KV beside the weights, with a tenth of the memory left alone."""
        return max(0, int(self.free_bytes * 0.9) - self.weight_bytes) // self.kv_bytes_per_token


def describe(
    path: Path, dtype: str = "auto", device: str = "auto", kv_cache_dtype: str = "auto"
) -> Description:
    """Read headers and configuration of a checkpoint.

    Args:
        path: Folder or file, see `resolve_model`.
        dtype: As in `BackendOptions`.
        device: As in `BackendOptions`.
        kv_cache_dtype: As in `BackendOptions`.

    Raises:
        ModelError: It cannot be loaded, as far as headers tell.
        ConfigError: Its keys and values cannot be stored so.
        DeviceError: The device is not there.
    """
    checkpoint = open_checkpoint(path)
    config = ModelConfig.from_fields(checkpoint.fields, checkpoint.eos_token_ids)
    architecture = find_architecture(config.architecture)
    place = pick_device(device)
    element = pick_dtype(dtype, config, place)
    layers = architecture.kv_layers(config)
    stored = kv_dtype(kv_cache_dtype, layers, element, place)
    scheme = scheme_for(checkpoint.fields)
    plan = plan_model(architecture, config, checkpoint, scheme, element)
    saved = [whole for whole, _ in plan.tensors]
    return Description(
        path=path,
        format=_format(path, config),
        config=config,
        num_parameters=_num_parameters(plan.model),
        weight_bytes=sum(tensor.num_bytes for tensor in saved),
        groups=tuple(_groups(saved)),
        dtype=str(element).removeprefix("torch."),
        kv_dtype=str(stored).removeprefix("torch."),
        kv_bytes_per_token=bytes_per_token(layers, stored),
        device=str(place),
        free_bytes=free_memory(place),
    )


def _format(path: Path, config: ModelConfig) -> str:
    quantization = config.fields.child("quantization_config")
    if quantization is not None:
        return quantization.get("quant_method", str, "quantized")
    return "GGUF" if path.suffix == ".gguf" else "safetensors"


def _num_parameters(model: Decoder) -> int:
    """Counts the weights a method stands for, not the tensors it would hold them in."""
    total = 0
    for module in model.modules():
        if isinstance(module, Linear):
            total += module.in_features * module.out_features
            total += 0 if module.bias is None else module.out_features
        else:
            total += sum(weight.numel() for weight in module.parameters(recurse=False))
    return total


def _groups(saved: Iterable[SavedTensor]) -> Iterable[TensorGroup]:
    members: dict[str, list[SavedTensor]] = {name: [] for name in GROUPS}
    for tensor in saved:
        members[_group_of(tensor.name)].append(tensor)
    for name, tensors in members.items():
        kinds: dict[str, int] = {}
        for tensor in tensors:
            kinds[tensor.kind] = kinds.get(tensor.kind, 0) + tensor.num_bytes
        ordered = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        if tensors:
            yield TensorGroup(name, len(tensors), sum(ordered.values()), ordered)


def _group_of(name: str) -> str:
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "output head"
    if "norm" in name:
        return "norms"
    if "experts" in name:
        return "experts"
    if "attn" in name or "attention" in name:
        return "attention"
    return "feed-forward" if ".mlp." in name or "feed_forward" in name else "other"
