"""The metadata of a GGUF file as the fields of a Hugging Face `config.json`.

What all architectures share is here, what some say beyond it in `families`.
"""

from __future__ import annotations

from typing import Any

from vllm_traits import ModelError

from vllm_models.gguf.architectures import ARCHITECTURES, GgufArchitecture
from vllm_models.gguf.families import FAMILIES
from vllm_models.gguf.header import GgufHeader
from vllm_models.gguf.metadata import Metadata
from vllm_models.gguf.rope import head_dim, rope_parameters
from vllm_models.gguf.types import GgmlType
from vllm_models.json_fields import JsonFields

# Ends of a turn, for the files that name only one end.
_END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end|>",
        "<end_of_turn>",
        "<turn|>",
    }
)
_SPECIAL_TYPES = (3, 4)  # control and user defined
_END_KEYS = ("eos", "eot", "eom")
_DTYPES = {GgmlType.F32: "float32", GgmlType.F16: "float16", GgmlType.BF16: "bfloat16"}


def find_gguf_architecture(header: GgufHeader) -> GgufArchitecture:
    """The row of the table that a file is of.

    Raises:
        ModelError: There is none.
    """
    metadata = Metadata(header)
    rows = [row for row in ARCHITECTURES if row.name == metadata.architecture]
    if not rows:
        known = ", ".join(sorted({row.name for row in ARCHITECTURES}))
        raise ModelError(
            f"{metadata.source}: the architecture {metadata.architecture!r} is not supported. "
            f"Supported: {known}."
        )
    return next(row for row in rows if len(rows) == 1 or row.model_type == _model_type(metadata))


def _model_type(metadata: Metadata) -> str:
    """Which of the Hugging Face models that are one in GGUF a file is."""
    has_window = metadata.get(".attention.sliding_window", int, 0) > 0
    if metadata.architecture == "olmo2":
        return "olmo3" if has_window else "olmo2"
    if metadata.get(".expert_count", int, 0):
        return "mixtral"
    return "mistral" if has_window else "llama"


def config_fields(header: GgufHeader) -> JsonFields:
    """The fields of a `config.json` that says the same as a file's metadata.

    Args:
        header: With its tensors, since some fields follow from what is there.

    Raises:
        ModelError: The architecture is not supported, or a key is missing or wrong; the message
            names file and key.
    """
    row, metadata = find_gguf_architecture(header), Metadata(header)
    values: dict[str, Any] = {
        "architectures": [row.model_class],
        "model_type": row.model_type,
        **_shape(metadata),
        **_attention(metadata),
        "rope_parameters": rope_parameters(metadata),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": _dtype(header),
        "eos_token_id": sorted(end_token_ids(metadata)),
    }
    values |= FAMILIES.get(row.model_type, lambda _: {})(metadata)
    return JsonFields(values, metadata.source)


def _shape(m: Metadata) -> dict[str, Any]:
    return {
        "hidden_size": m.positive(".embedding_length"),
        "intermediate_size": m.largest(".feed_forward_length"),
        "num_hidden_layers": m.num_layers - m.get(".nextn_predict_layers", int, 0),
        "vocab_size": _vocab_size(m),
        "max_position_embeddings": m.positive(".context_length"),
        "rms_norm_eps": m.need(".attention.layer_norm_rms_epsilon", float),
        "mlp_bias": m.has("ffn_down.bias"),
    }


def _attention(m: Metadata) -> dict[str, Any]:
    heads = m.same(".attention.head_count")
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": m.largest(".attention.head_count_kv", heads),
        "head_dim": head_dim(m),
        "attention_bias": m.has("attn_output.bias"),
    }


def _vocab_size(m: Metadata) -> int:
    """Rows of the embedding, which may be padded beyond the tokens that have a text."""
    embedding = m.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{m.source} lacks the matrix 'token_embd.weight'.")
    width = m.positive(".embedding_length")
    if embedding.shape[1] != width:
        raise m.error(".embedding_length", f"is {width}, but embeddings have {embedding.shape[1]}")
    return embedding.shape[0]


def _dtype(header: GgufHeader) -> str:
    """Type of the largest tensor; quantized weights are made for 16 bits."""
    largest = max(header.tensors.values(), key=lambda tensor: tensor.num_bytes)
    return _DTYPES.get(largest.type, "bfloat16")


def end_token_ids(m: Metadata) -> frozenset[int]:
    """Tokens that end a completion: those the metadata names, and well-known ones by their text."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in _END_KEYS)
    named = {found for key in keys if (found := m.find(key, int)) is not None}
    tokens = m.header.metadata.get("tokenizer.ggml.tokens")
    types = m.header.metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list):
        return frozenset(named)
    entries = enumerate(zip(tokens, types, strict=False))
    special = {text: i for i, (text, kind) in entries if kind in _SPECIAL_TYPES}
    texts = _END_TEXTS - {"<|end|>"} if "<|return|>" in special else _END_TEXTS
    return frozenset(named | {special[text] for text in texts if text in special})
