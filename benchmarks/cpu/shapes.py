"""Random checkpoints of known shapes: a Hugging Face folder, and GGUF files made from it.

Kept in a cache folder under the shape's name; made anew only if they are not there. The vocabulary
is synthetic: all bytes, all pairs of bytes and as many triples as the shape has room for.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm_models.gguf.export import export_gguf
from vllm_models.gguf.mixture import MIXTURES
from vllm_models.options import ignore_progress
from vllm_models.weights.checkpoint import open_checkpoint

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_DEVIATION = 0.02


class Shape(NamedTuple):
    """A model: its `config.json`.

    Attributes:
        name: Of its folder.
        fields: Everything else follows from them.
    """

    name: str
    fields: dict[str, Any]

    def __getitem__(self, key: str) -> Any:  # type: ignore[override]
        return self.fields[key]

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values in 16 bits."""
        heads = self.fields["num_key_value_heads"] * self.fields["head_dim"]
        return self.fields["num_hidden_layers"] * heads * 2 * 2


def _qwen3(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": _DEVIATION,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "head_dim": 128,
        "num_key_value_heads": 8,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **fields,
    }


SMALL = Shape(
    "qwen3-0.6b",
    _qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
)
EXPERTS = Shape(
    "qwen3-30b-a3b-4-layers",
    _qwen3(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=False,
    ),
)
TINY = Shape(
    "tiny",
    _qwen3(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=400,
        max_position_embeddings=256,
    ),
)
SHAPES = {shape.name: shape for shape in (SMALL, EXPERTS, TINY)}


def model_path(cache: Path, shape: Shape, weights: str) -> Path:
    """The folder for bf16, the GGUF file for other weights; made if it is not there."""
    folder = cache / shape.name
    if not folder.is_dir():
        write_folder(folder, shape)
    return folder if weights == "bf16" else gguf_path(folder, weights)


def gguf_path(folder: Path, weights: str) -> Path:
    """The folder's model as a GGUF file; made if it is not there."""
    from vllm_server.text.tokenizer_metadata import tokenizer_metadata  # needs its packages

    path = folder.with_name(f"{folder.name}-{weights}.gguf")
    if not path.is_file():
        checkpoint = open_checkpoint(folder)
        described = {
            "general.name": folder.name,
            **tokenizer_metadata(folder, checkpoint.fields.positive("vocab_size")),
        }
        export_gguf(checkpoint, path, MIXTURES[weights], described, ignore_progress)
    return path


def write_folder(folder: Path, shape: Shape) -> None:
    """A complete checkpoint, there only when everything is written."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    ends = {"bos_token_id": _first_special(shape), "eos_token_id": _first_special(shape) + 2}
    (unfinished / "config.json").write_text(json.dumps({**shape.fields, **ends}, indent=1))
    (unfinished / "tokenizer.json").write_text(json.dumps(_tokenizer(shape)))
    (unfinished / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": _SPECIAL[2], "pad_token": _SPECIAL[0]})
    )
    _write_safetensors(unfinished / "model.safetensors", list(tensors_of(shape)))
    unfinished.rename(folder)


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3 model's tensors."""
    width, vocabulary = shape["hidden_size"], shape["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(shape["num_hidden_layers"]):
        for name, size in _layer(shape):
            yield f"model.layers.{layer}.{name}.weight", size
    yield "model.norm.weight", (width,)
    if not shape["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, width)


def _layer(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, dim = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    yield "input_layernorm", (width,)
    yield "self_attn.q_proj", (queries, width)
    yield "self_attn.k_proj", (keys, width)
    yield "self_attn.v_proj", (keys, width)
    yield "self_attn.q_norm", (dim,)
    yield "self_attn.k_norm", (dim,)
    yield "self_attn.o_proj", (width, queries)
    yield "post_attention_layernorm", (width,)
    if "num_experts" not in shape.fields:
        yield from _mlp("mlp", width, shape["intermediate_size"])
        return
    yield "mlp.gate", (shape["num_experts"], width)
    for expert in range(shape["num_experts"]):
        yield from _mlp(f"mlp.experts.{expert}", width, shape["moe_intermediate_size"])


def _mlp(name: str, width: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj", (inner, width)
    yield f"{name}.up_proj", (inner, width)
    yield f"{name}.down_proj", (width, inner)


def _write_safetensors(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    """One tensor at a time, so that no more than that is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors:
        start, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    source = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, size in tensors:
            file.write(memoryview(_values(size, source).view(torch.uint8).flatten().numpy()))


def _values(size: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    values = torch.empty(size, dtype=torch.bfloat16)
    return values.fill_(1) if len(size) == 1 else values.normal_(0, _DEVIATION, generator=source)


def _first_special(shape: Shape) -> int:
    """Special tokens are at the end of the vocabulary, where Qwen has them if there is room."""
    return min(151_643, shape["vocab_size"] - len(_SPECIAL))


def _tokenizer(shape: Shape) -> dict[str, Any]:
    """Byte-level BPE: bytes, then pairs, then triples of letters that stand for bytes."""
    letters = _byte_letters()
    texts, merges = list(letters), []
    pairs = [(left, right) for left in letters for right in letters]
    triples = ((left + right, last) for left, right in pairs for last in letters)
    for merge in [*pairs, *_first(triples, shape["vocab_size"])]:
        if len(texts) == _first_special(shape):
            break
        texts.append("".join(merge))
        merges.append(merge)
    special = [
        {"id": len(texts) + i, "content": text, "special": True, "single_word": False}
        | {"lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(_SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    byte_level |= {"trim_offsets": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(texts)}, "merges": merges}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


def _first(items: Iterator[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [item for item, _ in zip(items, range(count), strict=False)]


def _byte_letters() -> list[str]:
    """A printable letter for each byte: itself, or one above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
