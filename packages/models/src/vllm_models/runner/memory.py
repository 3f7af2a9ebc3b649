"""How many KV blocks fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm_traits import ConfigError, DeviceError, KVGroup

from vllm_models.config import ModelConfig
from vllm_models.device import free_memory
from vllm_models.options import BackendOptions

_ACTIVATION_WIDTHS = 6  # live activations of a layer at once, in units of its widest part


@dataclass(frozen=True)
class MemoryReport:
    """What a backend holds, for the banner at the start.

    Attributes:
        num_blocks: KV blocks in the pool.
        block_size: Positions per block.
        bytes_per_block: Of all layers together.
        weight_bytes: Size of the parameters.
        dtype: Element type of weights and activations.
        kv_dtype: What is stored of keys and values.
        device: Where they are.
        max_model_len: Longest sequence in tokens.
        notes: What was decided for the user, in sentences.
    """

    num_blocks: int
    block_size: int
    bytes_per_block: int
    weight_bytes: int
    dtype: str
    kv_dtype: str
    device: str
    max_model_len: int
    notes: tuple[str, ...] = ()

    @property
    def kv_bytes(self) -> int:
        """Size of the KV pool."""
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """Positions that the KV pool holds."""
        return self.num_blocks * self.block_size

    @property
    def max_concurrency(self) -> float:
        """Sequences of full length that the KV pool holds."""
        return self.num_tokens / self.max_model_len


def plan_memory(
    options: BackendOptions,
    config: ModelConfig,
    groups: Sequence[KVGroup],
    target: tuple[torch.dtype, torch.device],
    weight_bytes: int,
    step_bytes: int | None = None,
) -> MemoryReport:
    """Decide the number of blocks and the longest sequence, with the weights already loaded.

    Args:
        options: What was asked for.
        config: Shape of the model.
        groups: What its layers keep of a block.
        target: What is computed in, and where everything is.
        weight_bytes: What the weights take there.
        step_bytes: What the largest step takes beside them, if it was measured.

    Raises:
        ConfigError: The longest sequence asked for is beyond the model or the blocks asked for.
        DeviceError: What was asked for does not fit; the message names what does.
    """
    dtype, device = target
    bytes_per_block = sum(group.bytes_per_block for group in groups)
    if step_bytes is None:
        step_bytes = _step_bytes(options, config, groups, dtype)
    fitting = _fitting_bytes(options, device, weight_bytes, step_bytes) // bytes_per_block
    wanted_len = _wanted_len(options, config)
    num_blocks = options.num_blocks
    if num_blocks is None:
        useful = options.max_sequences * -(-wanted_len // options.block_size)
        num_blocks = min(useful, fitting)
    _check_fit(options, num_blocks, fitting, bytes_per_block)
    max_model_len, notes = _fit_len(options, wanted_len, num_blocks)
    return MemoryReport(
        num_blocks=num_blocks,
        block_size=options.block_size,
        bytes_per_block=bytes_per_block,
        weight_bytes=weight_bytes,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=groups[0].dtype,
        device=str(device),
        max_model_len=max_model_len,
        notes=(*notes, *_window_notes(groups, max_model_len)),
    )


def _fitting_bytes(
    options: BackendOptions, device: torch.device, weight_bytes: int, step_bytes: int
) -> int:
    if options.kv_cache_memory is not None and options.num_blocks is None:
        return options.kv_cache_memory
    budget = (free_memory(device) + weight_bytes) * options.memory_fraction - weight_bytes
    return max(0, int(budget) - step_bytes)


def _step_bytes(
    options: BackendOptions, config: ModelConfig, groups: Sequence[KVGroup], dtype: torch.dtype
) -> int:
    """An estimate of what the largest step takes: activations and logits."""
    heads = max((config.num_heads + 2 * group.num_kv_heads) * group.key_dim for group in groups)
    widest = max(heads, 2 * config.intermediate_size, config.hidden_size)
    activations = options.max_batch_tokens * widest * _ACTIVATION_WIDTHS * dtype.itemsize
    return activations + 3 * options.max_sequences * config.vocab_size * 4


def _wanted_len(options: BackendOptions, config: ModelConfig) -> int:
    wanted = options.max_model_len or config.max_position
    if wanted > config.max_position:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model was made for {config.max_position}."
        )
    return wanted


def _check_fit(
    options: BackendOptions, num_blocks: int, fitting: int, bytes_per_block: int
) -> None:
    if min(num_blocks, fitting) < 1:
        raise DeviceError(
            f"No KV block of {bytes_per_block} bytes fits beside the weights; free memory, raise "
            f"--gpu-memory-utilization ({options.memory_fraction}) or --kv-cache-memory, or lower "
            "--max-num-seqs or --max-num-batched-tokens."
        )
    if num_blocks > fitting:
        raise DeviceError(
            f"num_blocks is {num_blocks} ({num_blocks * bytes_per_block >> 20} MiB), but only "
            f"{fitting} blocks fit in memory; use --num-blocks {fitting} or fewer."
        )


def _fit_len(
    options: BackendOptions, wanted_len: int, num_blocks: int
) -> tuple[int, tuple[str, ...]]:
    """A default length shrinks to what the blocks hold; one that was asked for does not."""
    capacity = num_blocks * options.block_size
    if wanted_len <= capacity:
        return wanted_len, ()
    if options.max_model_len is None:
        note = (
            f"The longest sequence is {capacity} tokens instead of {wanted_len}: memory is short."
        )
        return capacity, (note,)
    message = (
        f"max_model_len is {wanted_len}, but {num_blocks} KV blocks hold {capacity} tokens; use "
        f"--max-model-len {capacity}, or more blocks."
    )
    raise ConfigError(message) if options.num_blocks else DeviceError(message)


def _window_notes(groups: Sequence[KVGroup], max_model_len: int) -> tuple[str, ...]:
    """What layers with a window keep although they do not read it any more."""
    total = sum(group.bytes_per_block for group in groups) * max_model_len
    idle = sum(
        group.bytes_per_block * max(0, max_model_len - group.window)
        for group in groups
        if group.window
    )
    if not idle:
        return ()
    return (
        f"Layers with a window keep the KV of whole sequences: at {max_model_len} tokens, "
        f"{idle / total:.0%} of a sequence's KV memory is never read again.",
    )
