"""A checkpoint's `config.json` as typed values; knows no tensor and no architecture's code."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_traits import ModelError

from vllm_models.config_defaults import complete, layer_types
from vllm_models.json_fields import JsonFields
from vllm_models.rope_config import RopeConfig, read_ropes

_MAX_LAYERS = 1000
_MAX_POSITIONS = 1 << 30
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


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
        windows: Of every layer: positions a query looks back, its own included; 0 is all.
        rope: Rotary position embedding.
        local_rope: That of layers with a window, mostly the same.
        activation: Between the feed-forward projections, "silu" or "gelu_pytorch_tanh".
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
    windows: tuple[int, ...]
    rope: RopeConfig
    local_rope: RopeConfig
    activation: str
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: frozenset[int]
    dtype: str
    fields: JsonFields

    @classmethod
    def from_fields(
        cls,
        fields: JsonFields,
        eos_token_ids: frozenset[int],
        max_model_len: int | None = None,
    ) -> ModelConfig:
        """Interpret the values of a `config.json`.

        Args:
            fields: The values.
            eos_token_ids: Of all files of the checkpoint.
            max_model_len: Longest sequence that will be computed, if it is not what the model was
                made for; some rotary embeddings differ by it.

        Raises:
            ModelError: A field is missing, has the wrong type, or asks for something unsupported;
                the message names file and field.
        """
        fields = complete(fields)
        _refuse_bidirectional(fields)
        hidden_size = fields.positive("hidden_size")
        num_heads = fields.positive("num_attention_heads")
        num_layers = fields.positive("num_hidden_layers")
        max_position = fields.positive("max_position_embeddings")
        rope, local_rope = read_ropes(fields, max_model_len or max_position)
        config = cls(
            architecture=architecture_name(fields),
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.positive("num_key_value_heads", num_heads),
            head_dim=fields.positive("head_dim", max(1, hidden_size // num_heads)),
            vocab_size=fields.positive("vocab_size"),
            max_position=max_position,
            norm_eps=fields.get("rms_norm_eps", float, 1e-6),
            windows=_windows(fields, min(num_layers, _MAX_LAYERS)),
            rope=rope,
            local_rope=local_rope,
            activation=_activation(fields),
            tie_word_embeddings=fields.get("tie_word_embeddings", bool, False),
            attention_bias=fields.get("attention_bias", bool, False),
            mlp_bias=fields.get("mlp_bias", bool, False),
            eos_token_ids=eos_token_ids | fields.ids("eos_token_id"),
            dtype=fields.get("dtype", str, "") or fields.get("torch_dtype", str, ""),
            fields=fields,
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.max_position > _MAX_POSITIONS:
            raise ModelError(
                f"{self.fields.source}: max_position_embeddings is {self.max_position}, but no "
                f"context is longer than {_MAX_POSITIONS}."
            )
        if self.num_layers > _MAX_LAYERS:
            raise ModelError(
                f"{self.fields.source}: num_hidden_layers is {self.num_layers}, but no model has "
                f"more than {_MAX_LAYERS}."
            )
        num_pairs = int(self.head_dim * self.rope.rotated) // 2
        if self.rope.kind == "longrope" and len(self.rope.stretches) != num_pairs:
            raise ModelError(
                f"{self.fields.source}: long_factor and short_factor of longrope must have "
                f"{num_pairs} numbers, not {len(self.rope.stretches)}."
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


def architecture_name(fields: JsonFields) -> str:
    """The class that a `config.json` names.

    Raises:
        ModelError: It names none.
    """
    names = fields.get("architectures", list, [])
    if not names or not isinstance(names[0], str):
        raise ModelError(f"{fields.source}: 'architectures' must name the model's class.")
    return names[0]


def _refuse_bidirectional(fields: JsonFields) -> None:
    if fields.values.get("use_bidirectional_attention") in (True, "all"):
        raise ModelError(
            f"{fields.source}: 'use_bidirectional_attention' is not supported: every token sees "
            "only those before it."
        )


def _activation(fields: JsonFields) -> str:
    """Gemma has a field of its own, beside the usual one."""
    name = "hidden_activation" if fields.values.get("hidden_activation") else "hidden_act"
    activation = fields.get(name, str, "silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"{fields.source}: {name!r} {activation!r} is not supported "
            f"({', '.join(_ACTIVATIONS)} are)."
        )
    return activation


def _windows(fields: JsonFields, num_layers: int) -> tuple[int, ...]:
    """One for all layers of some, elsewhere by the kind of each layer."""
    if fields.get("model_type", str, "") in ("mistral", "mixtral", "phi3"):
        has_window = fields.values.get("sliding_window") is not None
        return (fields.positive("sliding_window") if has_window else 0,) * num_layers
    kinds = layer_types(fields, num_layers)
    known = all(kind in ("full_attention", "sliding_attention") for kind in kinds)
    if not known or len(kinds) not in (0, num_layers):
        raise ModelError(
            f"{fields.source}: 'layer_types' must name 'full_attention' or 'sliding_attention' "
            f"for each of {num_layers} layers."
        )
    if "sliding_attention" not in kinds or fields.values.get("use_sliding_window") is False:
        return (0,) * num_layers
    window = fields.positive("sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
