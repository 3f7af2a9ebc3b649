"""Making the runner of a device with kernels of its own, and finding out what its steps need."""

from __future__ import annotations

import gc

import numpy as np
import torch

from vllm_models.components.decoder import Decoder
from vllm_models.components.experts import Experts
from vllm_models.config import ModelConfig
from vllm_models.gpu.paged_decode import tile_for
from vllm_models.gpu.sample import sample
from vllm_models.options import BackendOptions
from vllm_models.runner.cost import CostModel
from vllm_models.runner.device.capture import Capture, GraphCapture, call_again
from vllm_models.runner.device.decode import DecodeSteps, bucket_sizes
from vllm_models.runner.device.inputs import Bounds, Sequences, StepInputs
from vllm_models.runner.device.rows import DeviceRows
from vllm_models.runner.device.runner import DeviceRunner
from vllm_models.runner.device.upload import Upload
from vllm_models.runner.kv import KVPool, allocate_kv


@torch.inference_mode()
def make_runner(
    model: Decoder,
    kv: KVPool,
    config: ModelConfig,
    options: BackendOptions,
    cost: CostModel,
    max_model_len: int,
) -> DeviceRunner:
    """A runner whose decode steps are captured, unless every step is to be walked through."""
    inputs = _inputs(kv, config, options, max_model_len)
    decode = None
    if not options.enforce_eager and _can_capture(model):
        sizes = bucket_sizes(options.max_sequences)
        decode = DecodeSteps(model, inputs, sizes, _capture(kv.device))
    return DeviceRunner(model, inputs, cost, decode)


def describe_attention(kv: KVPool) -> tuple[str, ...]:
    """What was chosen for the layers, in sentences."""
    found: dict[str, None] = {}
    for keys, values in kv.groups:
        dim, value_dim = keys.data.shape[-1], values.data.shape[-1]
        tile = tile_for(dim, value_dim, keys.data.itemsize, keys is values).tile
        found[f"Decode attention reads tiles of {tile} positions (heads of {dim})."] = None
    return tuple(found)


def _can_capture(model: Decoder) -> bool:
    """Whether no layer asks the device which experts were chosen."""
    return all(m.is_grouped for m in model.modules() if isinstance(m, Experts))


def _inputs(
    kv: KVPool, config: ModelConfig, options: BackendOptions, max_model_len: int
) -> StepInputs:
    limits = (options.max_sequences, max_model_len)
    rows = DeviceRows(*limits, kv, config.vocab_size, config.eos_token_ids)
    return StepInputs(rows, kv, config.num_heads)


def _capture(device: torch.device) -> Capture:
    return GraphCapture(device) if device.type == "cuda" else call_again


def measure_step_bytes(
    model: Decoder,
    config: ModelConfig,
    options: BackendOptions,
    stored: torch.dtype,
    target: tuple[torch.dtype, torch.device],
) -> int:
    """What rows, the largest prompt step and the largest captured decode step take on a CUDA
    device, beside weights and KV: run once on a pool of one block, then given back.

    Args:
        model: With its weights.
        config: Of the model.
        options: The largest steps.
        stored: What is kept of keys and values.
        target: What is computed in, and where.
    """
    device = target[1]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    _run_largest(model, config, options, stored, target)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    gc.collect()
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def _run_largest(
    model: Decoder,
    config: ModelConfig,
    options: BackendOptions,
    stored: torch.dtype,
    target: tuple[torch.dtype, torch.device],
) -> None:
    device = target[1]
    kv = allocate_kv(model.kv_layers(config), 1, options.block_size, *target, stored)
    inputs = _inputs(kv, config, options, options.max_model_len or config.max_position)
    rows = inputs.rows
    longest = min(options.max_batch_tokens, rows.capacity - 1)
    counts = [longest] * (options.max_batch_tokens // longest)
    sequences = _scratch_sequences(rows, counts)
    token_ids, ctx, lengths = inputs.make(sequences, Bounds(longest, longest, longest))
    hidden = model(token_ids, ctx)
    wanted = torch.arange(options.max_sequences, device=device) % len(hidden)
    scratch = torch.full_like(wanted, rows.scratch, dtype=torch.int32)
    sample(model.logits(hidden[wanted]), scratch, lengths[:1].expand_as(scratch), rows.sampling)
    if not options.enforce_eager and _can_capture(model):
        DecodeSteps(model, inputs, bucket_sizes(options.max_sequences)[-1:], _capture(device))


def _scratch_sequences(rows: DeviceRows, counts: list[int]) -> Sequences:
    """Prompts of some lengths, all in the row that nobody reads."""
    number = len(counts)
    sent = Upload(rows.device).send(
        [
            np.full(number, rows.scratch, np.int32),
            np.zeros(number, np.int32),
            np.cumsum([0, *counts], dtype=np.int32),
            np.repeat(np.arange(number, dtype=np.int32), counts),
        ]
    )
    return Sequences(*sent)
