"""A checkpoint's `config.json` as typed values; knows no tensor and no architecture's code."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_traits import ModelError

from vllm_models.json_fields import JsonFields

_MAX_LAYERS = 1000
_DEFAULT_HEAD_DIM = {"qwen3": 128}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        kind: "default", "linear", "llama3" or "yarn".
        theta: Base of the wavelengths.
        factor: How much longer than at training a context may be.
        original_max_position: Context length at training, before scaling.
        low_freq_factor: Of llama3.
        high_freq_factor: Of llama3.
        beta_fast: Of yarn.
        beta_slow: Of yarn.
        attention_factor: Of yarn: multiplies cosine and sine; None follows from the factor.
        truncate: Of yarn: whole dimensions bound the ramp.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only architecture needs to know about its shape.

    Attributes:
        architecture: First entry of `architectures`.
        hidden_size: Width of the model.
        intermediate_size: Width inside the feed-forward part.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of a head; need not be hidden_size / num_heads.
        vocab_size: Width of the logits.
        max_position: Longest context the model was made for.
        norm_eps: Added to the variance in RMSNorm.
        window: Positions a query looks back in every layer, its own included; 0 is all.
        rope: Rotary position embedding.
        tie_word_embeddings: The output head is the embedding table.
        attention_bias: The four attention projections have biases.
        mlp_bias: The feed-forward projections have biases.
        eos_token_ids: Of `config.json` and `generation_config.json` together.
        dtype: Element type the checkpoint was saved in, "" if it does not say.
        fields: The whole file, for architectures with fields of their own.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    window: int
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: frozenset[int]
    dtype: str
    fields: JsonFields

    @classmethod
    def from_fields(cls, fields: JsonFields, eos_token_ids: frozenset[int]) -> ModelConfig:
        """Interpret the values of a `config.json`.

        Raises:
            ModelError: A field is missing, has the wrong type, or asks for something unsupported;
                the message names file and field.
        """
        _refuse_unsupported(fields)
        hidden_size = fields.positive("hidden_size")
        num_heads = fields.positive("num_attention_heads")
        model_type = fields.get("model_type", str, "")
        head_dim = _DEFAULT_HEAD_DIM.get(model_type, max(1, hidden_size // num_heads))
        config = cls(
            architecture=_architecture(fields),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.positive("num_key_value_heads", num_heads),
            head_dim=fields.positive("head_dim", head_dim),
            vocab_size=fields.positive("vocab_size"),
            max_position=fields.positive("max_position_embeddings"),
            norm_eps=fields.get("rms_norm_eps", float, 1e-6),
            window=_window(fields),
            rope=_rope(fields),
            tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
            attention_bias=fields.get("attention_bias", bool, False),
            mlp_bias=fields.get("mlp_bias", bool, False),
            eos_token_ids=eos_token_ids,
            dtype=fields.get("dtype", str, "") or fields.get("torch_dtype", str, ""),
            fields=fields,
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.num_layers > _MAX_LAYERS:
            raise ModelError(
                f"{self.fields.source}: num_hidden_layers is {self.num_layers}, but no model has "
                f"more than {_MAX_LAYERS}."
            )
        if self.rope.kind == "llama3" and self.rope.high_freq_factor <= self.rope.low_freq_factor:
            raise ModelError(
                f"{self.fields.source}: high_freq_factor {self.rope.high_freq_factor} must be "
                f"greater than low_freq_factor {self.rope.low_freq_factor}."
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.fields.source}: num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ModelError(f"{self.fields.source}: head_dim {self.head_dim} must be even.")
        outside = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ModelError(
                f"{self.fields.source}: eos_token_id {outside} is outside the vocabulary of "
                f"{self.vocab_size}."
            )


def _architecture(fields: JsonFields) -> str:
    names = fields.get("architectures", list, [])
    if not names or not isinstance(names[0], str):
        raise ModelError(f"{fields.source}: 'architectures' must name the model's class.")
    return names[0]


def _refuse_unsupported(fields: JsonFields) -> None:
    """Features that change the arithmetic and are not there must not load silently."""
    activation = fields.get("hidden_act", str, "silu")
    if activation != "silu":
        raise ModelError(
            f"{fields.source}: 'hidden_act' {activation!r} is not supported (silu is)."
        )
    sliding = fields.get("use_sliding_window", bool, False)
    if sliding or "sliding_attention" in fields.get("layer_types", list, []):
        raise ModelError(
            f"{fields.source}: sliding-window attention in some of the layers is not supported."
        )


def _window(fields: JsonFields) -> int:
    """The window of Mistral and Mixtral holds in every layer; elsewhere the field alone is idle."""
    has_window = fields.get("model_type", str, "") in ("mistral", "mixtral")
    wanted = has_window and fields.values.get("sliding_window") is not None
    return fields.positive("sliding_window") if wanted else 0


def _rope(fields: JsonFields) -> RopeConfig:
    """Old checkpoints have `rope_theta` and `rope_scaling`, new ones `rope_parameters`."""
    scaling = fields.child("rope_parameters") or fields.child("rope_scaling")
    theta = fields.above_zero("rope_theta", 10000.0)
    if scaling is None:
        return RopeConfig(theta=theta)
    kind = scaling.get("rope_type", str, "") or scaling.get("type", str, "default")
    theta = scaling.above_zero("rope_theta", theta)
    _check_rope_kind(kind, scaling)
    if kind == "default":
        return RopeConfig(theta=theta)
    original = scaling.positive(
        "original_max_position_embeddings", fields.positive("max_position_embeddings")
    )
    scaling.need("factor", float)
    need = scaling.need if kind == "llama3" else lambda name, _: scaling.get(name, float, 1.0)
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=scaling.above_zero("factor", 1.0),
        original_max_position=original,
        low_freq_factor=need("low_freq_factor", float),
        high_freq_factor=need("high_freq_factor", float),
        beta_fast=scaling.above_zero("beta_fast", 32.0),
        beta_slow=scaling.above_zero("beta_slow", 1.0),
        attention_factor=scaling.values.get("attention_factor")
        and scaling.need("attention_factor", float),
        truncate=scaling.get("truncate", bool, True),
    )


def _check_rope_kind(kind: str, scaling: JsonFields) -> None:
    supported = ("default", "linear", "llama3", "yarn")
    if kind not in supported:
        raise ModelError(
            f"{scaling.source}: rope_type {kind!r} is not supported ({', '.join(supported)} are)."
        )
    if scaling.get("partial_rotary_factor", float, 1.0) != 1.0:
        raise ModelError(
            f"{scaling.source}: 'partial_rotary_factor' other than 1 is not supported."
        )
    if kind == "yarn" and (scaling.values.get("mscale") or scaling.values.get("mscale_all_dim")):
        raise ModelError(f"{scaling.source}: 'mscale' of yarn is not supported.")
