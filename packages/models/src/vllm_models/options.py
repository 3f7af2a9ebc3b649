"""What the user may choose about a backend, and how loading reports its progress.

Plain data without torch, so that a command line can be parsed and checked in no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from vllm_traits import ConfigError

from vllm_models.gguf.mixture import find_isq

DTYPES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "f16": "float16",
    "float16": "float16",
    "half": "float16",
    "f32": "float32",
    "float32": "float32",
    "float": "float32",
}
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class BackendOptions:
    """How a model is loaded and how much it may hold.

    Attributes:
        model: Local folder of the checkpoint, see `resolve_model`.
        dtype: Element type of weights and activations: auto, bf16, f16 or f32 (or a long name).
        kv_cache_dtype: How keys and values are stored: auto is as they are computed, int8 and fp8
            are eight bits beside a scale per position and head.
        device: auto, cpu, cuda or mps, optionally with an index such as cuda:1.
        num_blocks: KV blocks; None sizes the pool from memory.
        block_size: Positions per block.
        memory_fraction: Share of the free memory that weights and KV may use together.
        kv_cache_memory: Bytes for KV, instead of a fraction.
        max_model_len: Longest sequence; None takes the model's own limit, or less if memory is
            short.
        max_sequences: Sequences held at once.
        max_batch_tokens: Positions computed in one step.
        threads: CPU threads; None is one for a small model and torch's own choice for others.
        isq: Type that plain weights are quantized to while loading, see `gguf.mixture`; None leaves
            them as they are.
        enforce_eager: Walk through the layers in every step, and record no decode step.
        host_kv_share: Host memory for KV blocks that the pool has no room for, as a multiple of the
            pool; None keeps none.
        deterministic: Products sum in an order that does not depend on the batch, also where
            another is faster.

    Raises:
        ConfigError: A value that can never work.
    """

    model: Path
    dtype: str = "auto"
    device: str = "auto"
    num_blocks: int | None = None
    block_size: int = 16
    memory_fraction: float = 0.9
    kv_cache_memory: int | None = None
    max_model_len: int | None = None
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    threads: int | None = None
    isq: str | None = None
    enforce_eager: bool = False
    deterministic: bool = False
    host_kv_share: float | None = None
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, but must be one of {', '.join(DTYPES)}.")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}, but must be one of "
                f"{', '.join(KV_CACHE_DTYPES)}."
            )
        if self.device.split(":")[0] not in DEVICES:
            raise ConfigError(
                f"device is {self.device!r}, but must be one of {', '.join(DEVICES)}."
            )
        if self.isq is not None:
            find_isq(self.isq)
        if self.host_kv_share is not None and not 0 < self.host_kv_share < float("inf"):
            raise ConfigError(f"host_kv_share is {self.host_kv_share}, but must be above 0.")
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction is {self.memory_fraction}, but must be in (0, 1].")
        for name in (
            "num_blocks",
            "block_size",
            "kv_cache_memory",
            "max_model_len",
            "max_sequences",
            "max_batch_tokens",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1.")


class LoadProgress(NamedTuple):
    """Where loading stands.

    Attributes:
        stage: What is being done.
        fraction: Of this stage, 0 to 1.
        detail: A file name or a short remark for people.
    """

    stage: Literal["download", "load", "quantize", "warm-up", "self-check"]
    fraction: float
    detail: str = ""


OnProgress = Callable[[LoadProgress], None]


def ignore_progress(_: LoadProgress) -> None:
    """Report progress to nobody."""
