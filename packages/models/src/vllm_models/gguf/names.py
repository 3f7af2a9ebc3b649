"""What a tensor of a GGUF file is called in a Hugging Face checkpoint, and the other way round.

Knows names only; how values differ between the two is in `rearrange`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from vllm_models.gguf.architectures import GgufArchitecture

_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(.+)", re.ASCII)
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)", re.ASCII)
_EXPERT = re.compile(r"\bexperts\.(\d+)\.", re.ASCII)


class TensorName(NamedTuple):
    """One tensor in both formats.

    Attributes:
        gguf: Its name in GGUF, such as "blk.3.attn_q.weight".
        hf: Its name in a Hugging Face checkpoint; "{}" is the expert if GGUF stacks experts.
        stem: The GGUF name without layer and suffix, such as "attn_q".
        expert: Which one of the stack is meant; None is all of it.
        layer: Of which layer it is; None if it is of none.
    """

    gguf: str
    hf: str
    stem: str
    expert: int | None = None
    layer: int | None = None

    @property
    def is_stack(self) -> bool:
        """Whether GGUF holds the tensors of all experts in one."""
        return "{}" in self.hf


def from_gguf(architecture: GgufArchitecture, name: str) -> TensorName | None:
    """The tensor that GGUF calls `name`; None if this architecture has none."""
    layer = _GGUF_LAYER.fullmatch(name)
    inner, table = (name, architecture.top) if layer is None else (layer[2], architecture.tensors)
    found = _look_up(table, inner)
    if found is None:
        return None
    if layer is None:
        return TensorName(name, found, _stem(name))
    hf = f"model.layers.{layer[1]}.{found}"
    return TensorName(name, hf, _stem(inner), layer=int(layer[1]))


def from_hf(architecture: GgufArchitecture, name: str) -> TensorName | None:
    """The tensor that Hugging Face checkpoints call `name`; None if GGUF has none."""
    layer = _HF_LAYER.fullmatch(name)
    if layer is None:
        found = _look_up(_reversed(architecture.top), name)
        return None if found is None else TensorName(found, name, _stem(found))
    expert = _EXPERT.search(layer[2])
    inner = _EXPERT.sub("experts.{}.", layer[2])
    found = _look_up(_reversed(architecture.tensors), inner)
    if found is None:
        return None
    number, index = int(expert[1]) if expert else None, int(layer[1])
    hf = f"model.layers.{index}.{inner}"
    return TensorName(f"blk.{index}.{found}", hf, _stem(found), number, index)


def _look_up(table: Mapping[str, str], name: str) -> str | None:
    """By the whole name, or by the name without the suffix, which then stays."""
    stem, _, suffix = name.rpartition(".")
    whole = table.get(name)
    return whole or (f"{table[stem]}.{suffix}" if stem in table else None)


def _reversed(table: Mapping[str, str]) -> dict[str, str]:
    return {hf: gguf for gguf, hf in table.items()}


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
