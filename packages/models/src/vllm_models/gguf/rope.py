"""The rotary embedding of a GGUF file as Hugging Face fields.

Its factors for each wavelength are in small tensors, which are read here.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from vllm_traits import ModelError

from vllm_models.gguf.metadata import Metadata
from vllm_models.gguf.types import GgmlType

_MAX_FACTORS = 4096
Fields = dict[str, Any]


def head_dim(m: Metadata) -> int:
    """Width of a head, by default what the heads share of the model's width."""
    default = m.positive(".embedding_length") // m.same(".attention.head_count")
    width = m.positive(".attention.key_length", max(1, default))
    is_latent = m.find(".attention.kv_lora_rank", int) is not None  # then it counts something else
    if not is_latent and m.get(".attention.value_length", int, width) != width:
        raise m.error(".attention.value_length", f"is not {width} as the keys have it")
    return width


def rope_parameters(m: Metadata, width: int | None = None) -> Fields:
    """What `rope_parameters` says of layers that all rotate alike.

    Args:
        m: The metadata.
        width: Of a head, if it is not the one of the metadata.
    """
    width = width or head_dim(m)
    values: Fields = {"rope_theta": m.get(".rope.freq_base", float, 10000.0)}
    rotated = m.positive(".rope.dimension_count", width)
    if rotated > width or rotated % 2:
        raise m.error(".rope.dimension_count", f"is {rotated}, but must be even, up to {width}")
    if rotated != width:
        values["partial_rotary_factor"] = rotated / width
    return values | _scaling(m, rotated)


def _scaling(m: Metadata, rotated: int) -> Fields:
    kind = m.get(".rope.scaling.type", str, "linear")
    factor = m.get(".rope.scaling.factor", float, 0.0) or m.get(".rope.scale_linear", float, 0.0)
    if "rope_freqs.weight" in m.header.tensors:
        stretch = factor if kind == "linear" and factor else 1.0
        return _explicit(m, [stretch * f for f in factors(m, "rope_freqs.weight", rotated)])
    if kind == "yarn":
        return _yarn(m, factor or 1.0)
    if kind == "longrope" or "rope_factors_long.weight" in m.header.tensors:
        return _longrope(m, rotated)
    if kind not in ("none", "linear"):
        raise m.error(".rope.scaling.type", f"is {kind!r}, which is not supported")
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _yarn(m: Metadata, factor: float) -> Fields:
    values: Fields = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": _original_length(m),
        "beta_fast": m.get(".rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": m.get(".rope.scaling.yarn_beta_slow", float, 1.0),
    }
    for key in (".rope.scaling.attn_factor", ".rope.scaling.yarn_attn_factor"):
        scale = m.find(key, float)
        if scale is not None:  # on top of what follows from the factor
            values["attention_factor"] = scale * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return values


def _longrope(m: Metadata, rotated: int) -> Fields:
    original = _original_length(m)
    return {
        "rope_type": "longrope",
        "long_factor": factors(m, "rope_factors_long.weight", rotated),
        "short_factor": factors(m, "rope_factors_short.weight", rotated),
        "factor": m.positive(".context_length") / original,
        "original_max_position_embeddings": original,
        "attention_factor": m.get(".rope.scaling.attn_factor", float, 1.0),
    }


def _explicit(m: Metadata, factors: list[float]) -> Fields:
    """A factor for every wavelength is longrope with one list for contexts of any length."""
    return {
        "rope_type": "longrope",
        "long_factor": factors,
        "short_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": m.positive(".context_length"),
        "attention_factor": 1.0,
    }


def _original_length(m: Metadata) -> int:
    return m.positive(".rope.scaling.original_context_length", m.positive(".context_length"))


def factors(m: Metadata, name: str, rotated: int) -> list[float]:
    """The numbers of a small tensor, one for each rotated pair.

    Raises:
        ModelError: It is absent, of another type or length, or a number is not above zero.
    """
    info = m.header.tensors.get(name)
    if info is None:
        raise ModelError(f"{m.source} lacks the tensor {name!r}.")
    count = rotated // 2
    if info.type != GgmlType.F32 or info.shape != (count,) or count > _MAX_FACTORS:
        raise ModelError(f"{info.path}: {name} must be {count} numbers of type F32.")
    with info.path.open("rb") as file:
        file.seek(info.offset)
        values = list(struct.unpack(f"<{count}f", file.read(4 * count)))
    if not all(0 < value < math.inf for value in values):
        raise ModelError(f"{info.path}: {name} holds numbers that are not above zero.")
    return values
