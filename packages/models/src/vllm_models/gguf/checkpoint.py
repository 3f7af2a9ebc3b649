"""A GGUF file, or a set of them, as a checkpoint with Hugging Face names.

Weights are views of the mapped file, quantized ones as their blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from vllm_traits import ModelError

from vllm_models.gguf.config import config_fields, find_gguf_architecture
from vllm_models.gguf.header import TensorInfo, read_header
from vllm_models.gguf.latent import joined_latent
from vllm_models.gguf.metadata import Metadata
from vllm_models.gguf.names import TensorName, from_gguf
from vllm_models.gguf.rearrange import halves_from_pairs
from vllm_models.gguf.types import GgmlType
from vllm_models.weights.mapped import MappedFile
from vllm_models.weights.safetensors import add_samples
from vllm_models.weights.saved import SavedTensor

# Said by the configuration, or derived from it.
_NOT_WEIGHTS = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")
_DERIVED = ".attn_rot_embd."
# Two tensors that are one in Hugging Face checkpoints.
_PARTS_OF_LATENT = (".attn_k_b.weight", ".attn_v_b.weight")
_PLAIN = {
    GgmlType.F64: torch.float64,
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
    GgmlType.I64: torch.int64,
    GgmlType.I32: torch.int32,
    GgmlType.I16: torch.int16,
    GgmlType.I8: torch.int8,
}


class GgufCheckpoint:
    """Implements `Checkpoint`.

    Args:
        path: The file, or the first of a set.

    Raises:
        ModelError: It is damaged, or of an architecture that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.architecture = find_gguf_architecture(self.header)
        self.fields = config_fields(self.header)
        self.eos_token_ids = self.fields.ids("eos_token_id")

    def tensors(self) -> Iterator[SavedTensor]:
        """Every tensor of every file; a stack of experts gives one for each."""
        files = {path: MappedFile(path) for path in self.header.paths}
        num_layers = self.fields.positive("num_hidden_layers")
        for info in self.header.tensors.values():
            name = from_gguf(self.architecture, info.name)
            if _is_no_weight(info.name) or (name and (name.layer or 0) >= num_layers):
                continue
            whole = _saved(info, files[info.path])
            if name is None and info.name.endswith(_PARTS_OF_LATENT):
                yield from self._latent(info, files)
            elif name is None:
                yield whole
            elif name.is_stack:
                yield from self._experts(info, name, files[info.path])
            else:
                yield self._converted(whole, name)

    def fingerprint(self) -> bytes:
        """A digest of the whole header and of size and samples of every file."""
        first = min((info.offset for info in self.header.tensors.values()), default=0)
        digest = hashlib.sha256()
        for path in self.header.paths:
            add_samples(digest, path)
        with self.header.paths[0].open("rb") as file:
            digest.update(file.read(first))
        return digest.digest()

    def _converted(self, whole: SavedTensor, name: TensorName) -> SavedTensor:
        """One tensor with the values that the Hugging Face one of that name has."""
        row, suffix = self.architecture, name.gguf.rpartition(".")[2]
        found = whole._replace(name=name.hf)
        if name.stem in row.paired_rows:
            return found._replace(read=partial(self._in_halves, whole, name.stem))
        if row.offset_norms and name.stem.endswith("_norm") and suffix == "weight":
            return found._replace(kind="F32", read=lambda: whole.read().float() - 1.0)
        if name.stem == "ffn_gate_inp_shexp" and len(whole.shape) == 1:
            return found.part(name.hf, (1, *whole.shape), lambda rows: rows[None])
        return found

    def _latent(self, info: TensorInfo, files: Mapping[Path, MappedFile]) -> Iterator[SavedTensor]:
        """What makes keys and values from the latent vector, when the first of the two comes."""
        stem = info.name.rpartition(".attn_")[0]
        parts = [self.header.tensors.get(stem + ending) for ending in _PARTS_OF_LATENT]
        name = from_gguf(self.architecture, f"{stem}.attn_kv_b.weight")
        if name is None or None in parts:
            yield _saved(info, files[info.path])
        elif info == parts[0]:
            keys, values = (_saved(part, files[part.path]) for part in parts if part is not None)
            yield joined_latent(keys, values, name.hf)

    def _experts(
        self, info: TensorInfo, name: TensorName, file: MappedFile
    ) -> Iterator[SavedTensor]:
        """The tensors of a stack [E, ...], which lie one after the other."""
        count = Metadata(self.header).positive(".expert_count")
        if len(info.shape) < 2 or info.shape[0] != count:
            raise ModelError(
                f"{info.path}: {info.name} is {list(info.shape)}, which is no stack of {count}."
            )
        size = info.num_bytes // count
        for expert in range(count):
            offset = info.offset + expert * size
            part = TensorInfo(
                name.hf.format(expert), info.shape[1:], info.type, info.path, offset, size
            )
            yield _saved(part, file)

    def _in_halves(self, whole: SavedTensor, stem: str) -> Tensor:
        heads = "num_attention_heads" if stem == "attn_q" else "num_key_value_heads"
        rows, num_heads = whole.read(), self.fields.positive(heads)
        if len(rows) % (2 * num_heads):
            raise ModelError(
                f"{whole.source}: {whole.name} has {len(rows)} rows, which are not pairs in "
                f"{num_heads} heads."
            )
        return halves_from_pairs(rows, num_heads)


def _is_no_weight(name: str) -> bool:
    return name.startswith(_NOT_WEIGHTS) or _DERIVED in name


def _saved(info: TensorInfo, file: MappedFile) -> SavedTensor:
    read = partial(_read, file, info.offset, info.num_bytes, info.type, info.shape)
    release = partial(file.release, info.offset, info.num_bytes)
    kind, source = info.type.name, str(info.path)
    return SavedTensor(info.name, info.shape, kind, source, info.num_bytes, read, release)


def _read(
    file: MappedFile, offset: int, num_bytes: int, kind: GgmlType, shape: tuple[int, ...]
) -> Tensor:
    found = file.view(offset, num_bytes)
    dtype = _PLAIN.get(kind)
    if dtype is None:
        return found.view(math.prod(shape[:-1]), -1)
    if offset % dtype.itemsize:
        found = found.clone()  # torch wants elements at multiples of their size
    return found.view(dtype).view(shape)
