"""vllm-lite in a Python program: a model, prompts, answers.

    from vllm_lite import Engine, EngineConfig, Message, SamplingParams

    with Engine(EngineConfig(max_model_len=1024)) as engine:
        prompt = engine.apply_chat_template([Message("user", "What is vllm-lite?")])
        print(engine.generate_sync(SamplingParams(max_tokens=64), prompt)[0].decode_output)

The names are loaded when first used, so that `python -m vllm_lite.server --help` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_lite.config import EngineConfig
    from vllm_lite.engine import Engine
    from vllm_lite.outputs import GenerationOutput, GenerationStream, StreamItem
    from vllm_lite.params import Message, SamplingParams

_HOME = {
    "Engine": "vllm_lite.engine",
    "EngineConfig": "vllm_lite.config",
    "GenerationOutput": "vllm_lite.outputs",
    "GenerationStream": "vllm_lite.outputs",
    "Message": "vllm_lite.params",
    "SamplingParams": "vllm_lite.params",
    "StreamItem": "vllm_lite.outputs",
}

__all__ = [
    "Engine",
    "EngineConfig",
    "GenerationOutput",
    "GenerationStream",
    "Message",
    "SamplingParams",
    "StreamItem",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
