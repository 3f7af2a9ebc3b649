"""What a `config.json` says about rotary positions, in the spellings of old and new checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vllm_traits import ModelError

from vllm_models.json_fields import JsonFields

_OLD_NAMES = {"su": "longrope"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic", "proportional")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: "default", "linear", "llama3", "yarn", "longrope", "dynamic" or "proportional".
            Dynamic scaling starts where the longest sequence of the model ends, so it is default.
        theta: Base of the wavelengths.
        rotated: The part of a head that turns; of proportional: of the pairs of a whole head.
        interleaved: Pairs are neighbours, not a half of the head apart.
        factor: How much longer than at training a context may be.
        original_max_position: Context length at training, before scaling.
        low_freq_factor: Of llama3.
        high_freq_factor: Of llama3.
        beta_fast: Of yarn.
        beta_slow: Of yarn.
        attention_factor: Of yarn and longrope: multiplies cosine and sine; None follows from the
            factor.
        mscale: Of yarn: how much the factor counts in cosine and sine; 0 as usual.
        mscale_all_dim: Of yarn: how much of that is for architectures to put into the scores.
        truncate: Of yarn: whole dimensions bound the ramp.
        stretches: Of longrope: by which each wavelength is longer.
    """

    kind: str = "default"
    theta: float = 10000.0
    rotated: float = 1.0
    interleaved: bool = False
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    stretches: tuple[float, ...] = ()


def read_ropes(fields: JsonFields, max_model_len: int) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that look back to the start, and of those with a window.

    Args:
        fields: The whole file.
        max_model_len: Longest sequence that will be computed. Longrope has factors for short and
            for long contexts; keys stay in the KV cache with the angles that they got, so all
            sequences get those for long ones as soon as one may be longer than at training.
    """
    nested = fields.child("rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if nested is not None and any(kind in nested.values for kind in kinds):
        far, near = (
            _rope(
                JsonFields({**fields.values, "rope_parameters": nested.values.get(kind)}, source),
                max_model_len,
            )
            for kind, source in ((kind, f"{nested.source}: {kind}") for kind in kinds)
        )
        return far, near
    rope = _rope(fields, max_model_len)
    if "rope_local_base_freq" in fields.values:
        return rope, RopeConfig(theta=fields.above_zero("rope_local_base_freq", 10000.0))
    if fields.get("model_type", str, "") == "olmo3":
        return rope, RopeConfig(theta=rope.theta)
    return rope, rope


def _rope(fields: JsonFields, max_model_len: int) -> RopeConfig:
    """Old checkpoints have `rope_theta` and `rope_scaling`, new ones `rope_parameters`."""
    scaling = fields.child("rope_parameters") or fields.child("rope_scaling")
    scaling = scaling or JsonFields({}, fields.source)
    kind = scaling.get("rope_type", str, "") or scaling.get("type", str, "default")
    kind = _OLD_NAMES.get(kind, kind)
    if kind not in ROPE_TYPES:
        raise ModelError(
            f"{scaling.source}: rope_type {kind!r} is not supported ({', '.join(ROPE_TYPES)} are)."
        )
    usual = {
        "kind": kind,
        "theta": scaling.above_zero("rope_theta", fields.above_zero("rope_theta", 10000.0)),
        "rotated": _rotated(fields, scaling),
        "interleaved": fields.get("rope_interleave", bool, False),
    }
    match kind:
        case "default":
            return RopeConfig(**usual)
        case "proportional":
            return RopeConfig(**usual, factor=scaling.above_zero("factor", 1.0))
        case "longrope":
            return RopeConfig(**usual, **_longrope(fields, scaling, max_model_len))
    scaling.need("factor", float)
    usual["factor"] = scaling.above_zero("factor", 1.0)
    if kind in ("linear", "dynamic"):
        return RopeConfig(**usual)
    usual["original_max_position"] = _original(fields, scaling)
    return RopeConfig(**usual, **(_llama3(scaling) if kind == "llama3" else _yarn(scaling)))


def _rotated(fields: JsonFields, scaling: JsonFields) -> float:
    given = fields.above_zero("partial_rotary_factor", 1.0)
    rotated = scaling.above_zero("partial_rotary_factor", given)
    if rotated > 1:
        raise ModelError(f"{scaling.source}: 'partial_rotary_factor' {rotated} is more than 1.")
    return rotated


def _original(fields: JsonFields, scaling: JsonFields) -> int:
    name = "original_max_position_embeddings"
    default = fields.positive(name, fields.positive("max_position_embeddings"))
    return scaling.positive(name, default)


def _llama3(scaling: JsonFields) -> dict[str, Any]:
    low, high = (scaling.need(f"{side}_freq_factor", float) for side in ("low", "high"))
    if high <= low:
        raise ModelError(
            f"{scaling.source}: high_freq_factor {high} must be greater than low_freq_factor {low}."
        )
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn(scaling: JsonFields) -> dict[str, Any]:
    return {
        "beta_fast": scaling.above_zero("beta_fast", 32.0),
        "beta_slow": scaling.above_zero("beta_slow", 1.0),
        "attention_factor": _attention_factor(scaling),
        "mscale": scaling.get("mscale", float, 0.0),
        "mscale_all_dim": scaling.get("mscale_all_dim", float, 0.0),
        "truncate": scaling.get("truncate", bool, True),
    }


def _attention_factor(scaling: JsonFields) -> float | None:
    given = scaling.values.get("attention_factor") is not None
    return scaling.need("attention_factor", float) if given else None


def _longrope(fields: JsonFields, scaling: JsonFields, max_model_len: int) -> dict[str, Any]:
    original = _original(fields, scaling)
    longest = fields.positive("max_position_embeddings")
    factor = scaling.above_zero("factor", longest / original)
    attention_factor = _attention_factor(scaling)
    if attention_factor is None:
        is_long = factor > 1 and original > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if is_long else 1.0
    found = {name: _numbers(scaling, name) for name in ("short_factor", "long_factor")}
    return {
        "factor": factor,
        "original_max_position": original,
        "attention_factor": attention_factor,
        "stretches": found["long_factor" if max_model_len > original else "short_factor"],
    }


def _numbers(fields: JsonFields, name: str) -> tuple[float, ...]:
    found = tuple(
        JsonFields({name: number}, fields.source).above_zero(name, 1.0)
        for number in fields.need(name, list)
    )
    if not found:
        raise ModelError(f"{fields.source}: {name!r} is empty.")
    return found
