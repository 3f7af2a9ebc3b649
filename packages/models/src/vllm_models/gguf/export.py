"""A checkpoint as a GGUF file, quantized tensor by tensor while it is written."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from vllm_traits import ModelError

from vllm_models.gguf.architectures import GgufArchitecture
from vllm_models.gguf.keys import architecture_of, model_keys, rope_factors
from vllm_models.gguf.mixture import Mixture, Shape, choose_type, shape_of
from vllm_models.gguf.names import TensorName, from_hf
from vllm_models.gguf.quantize.weights import quantize
from vllm_models.gguf.rearrange import pairs_from_halves
from vllm_models.gguf.types import GgmlType
from vllm_models.gguf.write import Metadata, NewTensor, write_gguf
from vllm_models.json_fields import JsonFields
from vllm_models.options import LoadProgress, OnProgress
from vllm_models.weights.checkpoint import Checkpoint
from vllm_models.weights.saved import PLAIN_KINDS, SavedTensor

_QUANTIZATION_VERSION = 2
_TOKENIZER = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")
_DERIVED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class _Source(NamedTuple):
    """One tensor of the new file and what it is made of: one tensor, or one for each expert."""

    name: TensorName
    parts: tuple[SavedTensor, ...]


def export_gguf(
    checkpoint: Checkpoint,
    path: Path,
    mixture: Mixture,
    described: Metadata,
    on_progress: OnProgress,
) -> None:
    """Write a complete file.

    Args:
        checkpoint: Not quantized.
        path: Replaced when everything is written.
        mixture: Types of the weights.
        described: Keys beyond the model's own, such as the tokenizer's.
        on_progress: Told about every tensor.

    Raises:
        ModelError: The checkpoint is quantized, its architecture cannot be written, a tensor has
            no name in GGUF, or the file cannot be written.
    """
    fields = checkpoint.fields
    row = architecture_of(fields)
    keys = model_keys(fields)
    saved = {tensor.name: tensor for tensor in checkpoint.tensors()}
    sources = list(_sources(saved, row, fields))
    shape = shape_of(saved)
    progress = _Progress(on_progress, sum(part.num_bytes for s in sources for part in s.parts))
    tensors = [
        NewTensor(
            source.name.gguf,
            _shape(source),
            kind := _kind(source, mixture, shape),
            partial(_read, source, kind, _heads(source.name, row, fields), progress.add),
        )
        for source in sources
    ]
    file = {
        "general.file_type": mixture.number,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    ends = _end_keys(checkpoint.eos_token_ids, described)
    write_gguf(path, {**keys, **file, **described, **ends}, [*_factors(fields), *tensors])


def _end_keys(ids: frozenset[int], described: Metadata) -> Metadata:
    """The model's own tokens that end a completion, the tokenizer's first if it is one of them."""
    first = described.get(f"{_TOKENIZER}eos_token_id")
    ordered = sorted(ids, key=lambda token: (token != first, token))
    return {f"{_TOKENIZER}{end}_token_id": i for end, i in zip(_ENDS, ordered, strict=False)}


def _sources(
    saved: Mapping[str, SavedTensor], row: GgufArchitecture, fields: JsonFields
) -> Iterator[_Source]:
    """Tensors in the order of the checkpoint, a stack of experts at its first."""
    tied = fields.get("tie_word_embeddings", bool, False)
    stacks: dict[str, dict[int, SavedTensor]] = {}
    for tensor in saved.values():
        if tensor.name.endswith(_DERIVED) or (tied and tensor.name == "lm_head.weight"):
            continue
        name = _named(tensor, row)
        stacks.setdefault(name.gguf, {})[name.expert or 0] = tensor
    for experts in stacks.values():
        first = _named(next(iter(experts.values())), row)
        yield _Source(first, tuple(_whole(experts, first)))


def _named(tensor: SavedTensor, row: GgufArchitecture) -> TensorName:
    if tensor.kind not in PLAIN_KINDS:
        raise ModelError(
            f"{tensor.source}: {tensor.name} is {tensor.kind}, so the model is quantized already. "
            "Give the model's original weights."
        )
    name = from_hf(row, tensor.name)
    if name is None:
        raise ModelError(
            f"{tensor.source}: {tensor.name} has no place in GGUF files of {row.name} models."
        )
    return name


def _whole(experts: Mapping[int, SavedTensor], name: TensorName) -> Sequence[SavedTensor]:
    missing = [index for index in range(len(experts)) if index not in experts]
    if missing:
        raise ModelError(f"Expert {missing[0]} of {name.hf} is missing.")
    return [experts[index] for index in range(len(experts))]


def _shape(source: _Source) -> tuple[int, ...]:
    shape = source.parts[0].shape
    if source.name.is_stack:
        return (len(source.parts), *shape)
    return shape[1:] if source.name.stem == "ffn_gate_inp_shexp" else shape


def _kind(source: _Source, mixture: Mixture, model: Shape) -> GgmlType:
    """Vectors and routers stay exact; what no block type holds gets 16 bits."""
    shape = _shape(source)
    if len(shape) < 2 or source.name.stem == "ffn_gate_inp":
        return GgmlType.F32
    layer = source.parts[0].name.removesuffix(".weight")
    return choose_type(mixture, layer, shape[-1], model) or GgmlType.F16


def _heads(name: TensorName, row: GgufArchitecture, fields: JsonFields) -> int:
    """Heads whose rows are to be paired; 0 if they stay in order."""
    if name.stem not in row.paired_rows:
        return 0
    heads = fields.positive("num_attention_heads")
    return heads if name.stem == "attn_q" else fields.positive("num_key_value_heads", heads)


def _read(
    source: _Source, kind: GgmlType, heads: int, done: Callable[[SavedTensor], None]
) -> memoryview:
    blocks: list[Tensor] = []
    for part in source.parts:
        weight = part.read()
        if heads:
            weight = pairs_from_halves(weight, heads)
        try:
            blocks.append(quantize(weight.reshape(-1, weight.shape[-1]), kind))
        except ValueError as error:
            raise ModelError(f"{part.source}: {part.name} {error}.") from error
        part.release()
        done(part)
    return _bytes(blocks[0] if len(blocks) == 1 else torch.cat(blocks))


def _bytes(blocks: Tensor) -> memoryview:
    """The tensor's own memory, which lives as long as the view."""
    buffer = (ctypes.c_ubyte * blocks.numel()).from_address(blocks.data_ptr())
    vars(buffer)["tensor"] = blocks
    return memoryview(buffer)


def _factors(fields: JsonFields) -> Iterator[NewTensor]:
    found = torch.tensor(rope_factors(fields), dtype=torch.float32)
    if len(found):
        data = partial(_bytes, found.view(torch.uint8))
        yield NewTensor("rope_freqs.weight", (len(found),), GgmlType.F32, data)


class _Progress:
    """Counts bytes that were read."""

    def __init__(self, report: OnProgress, total: int) -> None:
        self._report, self._total = report, max(total, 1)
        self._done, self._started = 0, time.monotonic()

    def add(self, tensor: SavedTensor) -> None:
        """One more tensor is written."""
        self._done += tensor.num_bytes
        rate = self._done / max(time.monotonic() - self._started, 1e-6) / 1e9
        self._report(LoadProgress("quantize", self._done / self._total, f"{rate:.2f} GB/s"))
