"""Tiny random checkpoints made with HF transformers, and what HF says about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from vllm_models import BackendOptions, TorchBackend, load_backend

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@dataclass
class Checkpoint:
    """A folder and the HF model it was saved from."""

    folder: Path
    model: Any

    def load(self, **options: Any) -> TorchBackend:
        defaults = {"dtype": "f32", "device": "cpu", "block_size": 4, "max_sequences": 16}
        defaults |= {"num_blocks": 128, "max_batch_tokens": 512}
        return load_backend(BackendOptions(self.folder, **(defaults | options)))

    @torch.inference_mode()
    def logits(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        return self.model(torch.tensor([token_ids])).logits[0].float()

    @torch.inference_mode()
    def greedy(self, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """Greedy completion by full recomputation, without HF's cache."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tuple(tokens))[-1].argmax()))
        return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Write a checkpoint that differs from `SMALL` by the given fields."""

    def make(
        family: str = "llama",
        saved_as: torch.dtype = torch.float32,
        shard_size: str = "1GB",
        rewrite: Callable[[dict[str, Any]], None] | None = None,
        **changes: Any,
    ) -> Checkpoint:
        folder = tmp_path_factory.mktemp("checkpoint")
        torch.manual_seed(1)
        config_class, model_class = CLASSES[family]
        model = model_class(config_class(**(SMALL | changes))).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # HF starts these at 0 and 1
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
        model.to(saved_as).save_pretrained(folder, max_shard_size=shard_size)
        if rewrite is not None:
            path = folder / "config.json"
            fields = json.loads(path.read_text())
            rewrite(fields)
            path.write_text(json.dumps(fields))
        return Checkpoint(folder, model_class.from_pretrained(folder, dtype=torch.float32).eval())

    return make


@pytest.fixture(scope="session")
def small(make_checkpoint: MakeCheckpoint) -> Checkpoint:
    """The plainest checkpoint, for tests that are not about architectures."""
    return make_checkpoint()
