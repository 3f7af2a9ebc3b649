"""Models of known shapes whose random weights are made where they are used, and never on a disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm_models import BackendOptions, TorchBackend, load_backend
from vllm_models.json_fields import JsonFields
from vllm_models.weights.saved import SavedTensor

from benchmarks.cpu.shapes import EXPERTS, SMALL, TINY, Shape, tensors_of

_DEVIATION = 0.02
_CODE = 0.0002  # of an 8-bit weight, so that codes use most of their range
_GROUP = 128
_SYMMETRIC = 0x77777777  # zero points of 8, less one

LLAMA8 = Shape(
    "llama-3.1-8b",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
)
EXPERTS30 = EXPERTS._replace(
    name="qwen3-30b-a3b", fields=EXPERTS.fields | {"num_hidden_layers": 48}
)
TINY_EXPERTS = TINY._replace(
    name="tiny-experts",
    fields=TINY.fields
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
)
SHAPES = {shape.name: shape for shape in (SMALL, LLAMA8, EXPERTS30, TINY, TINY_EXPERTS)}


@dataclass(frozen=True)
class RandomCheckpoint:
    """A checkpoint whose tensors are drawn on a device when they are read.

    Attributes:
        shape: Of the model.
        weights: bf16; fp8 with a scale per row; or w4, GPTQ in groups of 128.
        device: Where tensors are made.
    """

    shape: Shape
    weights: str
    device: torch.device

    @property
    def path(self) -> Path:
        """Nowhere."""
        return Path(f"{self.shape.name}-{self.weights}-random")

    @property
    def fields(self) -> JsonFields:
        """The shape, and how weights are held."""
        return JsonFields(self.shape.fields | self._quantization(), f"{self.path}/config.json")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The last token."""
        return frozenset({self.shape["vocab_size"] - 1})

    def tensors(self) -> Iterator[SavedTensor]:
        """All, each from a seed of its own."""
        has_norms = self.shape["model_type"].startswith("qwen3")
        for name, size in tensors_of(self.shape):
            if not has_norms and name.endswith(("q_norm.weight", "k_norm.weight")):
                continue
            if self.weights != "bf16" and ".layers." in name and name.endswith("_proj.weight"):
                yield from self._packed(name, size)
            else:
                yield self._saved(name, size, "BF16", partial(self._plain, size))

    def fingerprint(self) -> bytes:
        """Of the shape, since all else follows from it."""
        return sha256(repr((self.shape, self.weights)).encode()).digest()

    def _quantization(self) -> dict[str, Any]:
        if self.weights == "bf16":
            return {}
        config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        if self.weights == "w4":
            config = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True}
            config["group_size"] = self._group
        return {"quantization_config": config}

    @property
    def _group(self) -> int:
        """As many columns as divide every row."""
        inner = self.shape.fields.get("moe_intermediate_size", self.shape["intermediate_size"])
        return math.gcd(_GROUP, self.shape["hidden_size"], inner)

    def _packed(self, name: str, size: tuple[int, ...]) -> Iterator[SavedTensor]:
        rows, columns = size
        base = name.removesuffix("weight")
        if self.weights == "fp8":
            scales = partial(torch.full, (rows, 1), _CODE)
            yield self._saved(name, size, "F8_E4M3", partial(self._codes, size))
            yield self._saved(f"{base}weight_scale", (rows, 1), "F32", scales)
            return
        words, groups = (columns // 8, rows), columns // self._group
        yield self._saved(f"{base}qweight", words, "I32", partial(self._words, words))
        zeros = (groups, rows // 8)
        made = partial(torch.full, zeros, _SYMMETRIC, dtype=torch.int32)
        yield self._saved(f"{base}qzeros", zeros, "I32", made)
        made = partial(torch.full, (groups, rows), _DEVIATION / 4, dtype=torch.float16)
        yield self._saved(f"{base}scales", (groups, rows), "F16", made)

    def _saved(self, name: str, size: tuple[int, ...], kind: str, make: Any) -> SavedTensor:
        width = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4}[kind]
        seed = int.from_bytes(sha256(name.encode()).digest()[:4], "big")

        def read() -> Tensor:
            torch.manual_seed(seed)
            return make(device=self.device)

        num_bytes = width * math.prod(size)
        return SavedTensor(name, size, kind, str(self.path), num_bytes, read, _keep)

    def _plain(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.fill_(1) if len(size) == 1 else values.normal_(0, _DEVIATION)

    def _codes(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.normal_(0, _DEVIATION / _CODE).clamp_(-448, 448).to(torch.float8_e4m3fn)

    def _words(self, size: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, size, dtype=torch.int32, device=device)


def _keep() -> None:
    """Nothing is mapped."""


def load(shape: Shape, weights: str, device: torch.device, **options: Any) -> TorchBackend:
    """A backend as the server loads it, but for where the weights come from.

    Args:
        shape: Of the model.
        weights: See `RandomCheckpoint`.
        device: Where it runs.
        options: Of the backend.
    """
    checkpoint = RandomCheckpoint(shape, weights, device)
    chosen = BackendOptions(model=checkpoint.path, device=str(device), **options)
    return load_backend(chosen, checkpoint=checkpoint)
