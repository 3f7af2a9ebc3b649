"""Everything that knows tensors: checkpoints, architectures, sampling and the torch backend.

Importing this package does not import torch; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vllm_models.options import BackendOptions, LoadProgress

if TYPE_CHECKING:
    from vllm_models.backend import TorchBackend, load_backend
    from vllm_models.config import ModelConfig
    from vllm_models.hub import resolve_model
    from vllm_models.registry import register_architecture, supported_architectures
    from vllm_models.runner.memory import MemoryReport

_HOME = {
    "MemoryReport": "vllm_models.runner.memory",
    "ModelConfig": "vllm_models.config",
    "TorchBackend": "vllm_models.backend",
    "load_backend": "vllm_models.backend",
    "register_architecture": "vllm_models.registry",
    "resolve_model": "vllm_models.hub",
    "supported_architectures": "vllm_models.registry",
}

__all__ = [
    "BackendOptions",
    "LoadProgress",
    "MemoryReport",
    "ModelConfig",
    "TorchBackend",
    "load_backend",
    "register_architecture",
    "resolve_model",
    "supported_architectures",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
