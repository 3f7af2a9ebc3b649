"""Tiny random checkpoints made with HF transformers, and what HF says about them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Glm4Config,
    Glm4ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
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
from vllm_models.gpu.launch import mode
from vllm_models.native.library import library

CLASSES = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FLAT = ("bias", "layer_scalar", "per_expert_scale", "router.scale")  # HF starts these at 0 or 1
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


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything by torch: weights as they are, and products that are exact to float32, where the
    CPU's kernels pad and reorder weights and round activations to 8 bits.
    """
    monkeypatch.setenv("VLLM_LITE_NATIVE", "off")
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The code path of a GPU, on the CPU in Triton's interpreter where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("VLLM_LITE_TRITON", "interpret")
    mode.cache_clear()
    yield
    mode.cache_clear()


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
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(FLAT) or "norm" in name:
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
