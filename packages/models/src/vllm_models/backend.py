"""The torch backend: a model behind the engine's protocol, and how one is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from vllm_traits import (
    BackendError,
    BackendInfo,
    Batch,
    BlockStore,
    Chunk,
    InFlight,
    PoolingParams,
    SamplingParams,
    Start,
)

from vllm_models.components.decoder import Decoder
from vllm_models.config import ModelConfig, architecture_name
from vllm_models.determinism import batch_dependence, fix_orders
from vllm_models.device import free_memory, pick_device, pick_dtype, set_threads
from vllm_models.gpu.launch import mode, serves
from vllm_models.measure import KernelSpeed, measure_kernels
from vllm_models.native.library import loaded as native
from vllm_models.options import BackendOptions, LoadProgress, OnProgress, ignore_progress
from vllm_models.pooling_config import default_pooling
from vllm_models.quantization.isq import IsqScheme
from vllm_models.quantization.scheme import scheme_for
from vllm_models.registry import find_architecture
from vllm_models.runner.cost import CostModel
from vllm_models.runner.host_store import HostStore
from vllm_models.runner.kv import KVPool, allocate_kv, kv_dtype, kv_groups
from vllm_models.runner.memory import MemoryReport, plan_memory
from vllm_models.runner.recorded import RecordedSteps
from vllm_models.runner.rows import Rows
from vllm_models.runner.runner import Runner
from vllm_models.weights.checkpoint import Checkpoint, open_checkpoint
from vllm_models.weights.load import load_model, num_bytes

if TYPE_CHECKING:
    from vllm_models.runner.device.runner import DeviceRunner


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says that is not for the engine but for the server.

    Attributes:
        config: The model's shape.
        memory: What was allocated.
        default_pooling: Of a sentence-transformers checkpoint; None for others.
        batch_dependence: Why results may depend on the batch; nothing if they never do.
        stores: Where blocks are kept besides the pool.
    """

    config: ModelConfig
    memory: MemoryReport
    default_pooling: PoolingParams | None
    batch_dependence: tuple[str, ...]
    stores: tuple[BlockStore, ...] = ()


class TorchBackend:
    """Runs batches on one device; implements `vllm_traits.ModelBackend`.

    Args:
        runner: Rows, pool and model.
        info: Limits for the engine.
        loaded: What else is known about the checkpoint.
    """

    def __init__(self, runner: Runner | DeviceRunner, info: BackendInfo, loaded: Loaded) -> None:
        self._runner: Runner | DeviceRunner | None = runner
        self._info = info
        self.loaded = loaded

    @property
    def info(self) -> BackendInfo:
        """Limits; constant."""
        return self._info

    @property
    def stores(self) -> Sequence[BlockStore]:
        """Host memory, if the pool has some beside it."""
        return self.loaded.stores

    @property
    def memory(self) -> MemoryReport:
        """What was allocated, for the banner at the start."""
        return self.loaded.memory

    def forward(self, batch: Batch) -> InFlight:
        """Compute a batch, sampling included unless a chunk is masked; where the device has kernels
        of its own the batch is launched, and read later.

        Raises:
            BackendError: The device failed, or the batch breaks a rule of the protocol.
        """
        if self._runner is None:
            raise BackendError("The backend is closed.")
        torch.get_num_threads()  # tells a new thread how many were chosen, before kernels ask
        try:
            return self._runner.forward(batch)
        except (RuntimeError, IndexError) as error:
            raise BackendError(f"Step {batch.step} failed on the device: {error}") from error

    def measure_kernels(self) -> KernelSpeed | None:
        """How close the kernels come to the memory's limit; None where torch computes.

        Raises:
            BackendError: The backend is closed.
        """
        if self._runner is None:
            raise BackendError("The backend is closed.")
        is_cpu = isinstance(self._runner, Runner) and self.memory.device == "cpu"
        return measure_kernels(self._runner.model) if is_cpu else None

    def close(self) -> None:
        """Drop weights, rows and the KV pool."""
        self._runner = None


def load_backend(
    options: BackendOptions,
    on_progress: OnProgress | None = None,
    checkpoint: Checkpoint | None = None,
) -> TorchBackend:
    """Load a checkpoint, size and allocate the KV pool, and run one warm-up step of every kind.

    Args:
        options: What to load and how much it may hold.
        on_progress: Told about every stage.
        checkpoint: To be loaded instead of the one at `options.model`.

    Raises:
        ModelError: The checkpoint cannot be loaded.
        ConfigError: An option does not fit the model.
        DeviceError: The device is missing or too small.
    """
    report = on_progress or ignore_progress
    checkpoint = checkpoint or open_checkpoint(options.model)
    architecture = find_architecture(architecture_name(checkpoint.fields))
    config = ModelConfig.from_fields(
        checkpoint.fields, checkpoint.eos_token_ids, options.max_model_len
    )
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, config, device)
    layers = architecture.kv_layers(config)
    stored = kv_dtype(options.kv_cache_dtype, layers, dtype, device)
    scheme = IsqScheme(options.isq) if options.isq else scheme_for(checkpoint.fields)
    model = load_model(architecture, config, checkpoint, scheme, (dtype, device), report)
    set_threads(options.threads, device, num_bytes(model))
    groups = kv_groups(layers, options.block_size, stored)
    if options.deterministic:
        fix_orders(model)
    step_bytes = None
    if device.type == "cuda" and serves(device):
        from vllm_models.runner.device.assemble import measure_step_bytes

        report(LoadProgress("warm-up", 0.0, "the largest steps"))
        step_bytes = measure_step_bytes(model, config, options, stored, (dtype, device))
    size = num_bytes(model)
    memory = plan_memory(options, config, groups, (dtype, device), size, step_bytes)
    backend = _assemble(options, checkpoint, config, model, memory)
    if mode() != "interpret":
        _warm_up(backend, report)
    return backend


def _assemble(
    options: BackendOptions,
    checkpoint: Checkpoint,
    config: ModelConfig,
    model: Decoder,
    memory: MemoryReport,
) -> TorchBackend:
    dtype, stored = (getattr(torch, name) for name in (memory.dtype, memory.kv_dtype))
    layers, device = model.kv_layers(config), torch.device(memory.device)
    groups = kv_groups(layers, options.block_size, stored)
    kv = allocate_kv(layers, memory.num_blocks, options.block_size, dtype, device, stored)
    if serves(device):
        from vllm_models.runner.device.assemble import describe_attention

        memory = replace(memory, notes=(*memory.notes, *describe_attention(kv)))
    max_sequences = options.max_sequences
    ropes = (config.rope, config.local_rope)
    layout = f"{memory.dtype}:{options.block_size}:{groups}:{kv.layout}:{ropes}"
    info = BackendInfo(
        num_blocks=memory.num_blocks,
        block_size=options.block_size,
        max_model_len=memory.max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        max_sequences=max_sequences,
        max_batch_tokens=options.max_batch_tokens,
        kv_groups=groups,
        fingerprint=sha256(checkpoint.fingerprint() + layout.encode()).digest(),
    )
    loaded = Loaded(
        config,
        memory,
        default_pooling(options.model),
        batch_dependence(model, kv),
        _stores(options, memory, kv),
    )
    return TorchBackend(_make_runner(options, config, model, kv, memory), info, loaded)


def _stores(options: BackendOptions, memory: MemoryReport, kv: KVPool) -> tuple[BlockStore, ...]:
    if options.host_kv_share is None:
        return ()
    fitting = free_memory(torch.device("cpu")) // 2 // memory.bytes_per_block
    num_blocks = min(int(options.host_kv_share * memory.num_blocks), fitting)
    return (HostStore(kv, num_blocks),) if num_blocks else ()


def _make_runner(
    options: BackendOptions, config: ModelConfig, model: Decoder, kv: KVPool, memory: MemoryReport
) -> Runner | DeviceRunner:
    groups = kv_groups(model.kv_layers(config), kv.block_size, kv.dtype)
    cost = CostModel(model, groups, kv.block_size, config)
    if serves(kv.device):
        from vllm_models.runner.device.assemble import make_runner

        return make_runner(model, kv, config, options, cost, memory.max_model_len)
    limits = (options.max_sequences, memory.max_model_len)
    rows = Rows(*limits, kv, config.vocab_size, config.eos_token_ids)
    is_recorded = kv.layout == "native" and not options.enforce_eager
    recorded = RecordedSteps(model, native(), rows, kv) if is_recorded else None
    return Runner(model, kv, rows, cost if kv.device.type == "cpu" else None, recorded)


def _warm_up(backend: TorchBackend, on_progress: OnProgress) -> None:
    """A prompt and a decode, greedy and sampled, so that no first request pays for set-up."""
    info = backend.info
    length = max(1, min(info.block_size, info.max_model_len - 1, info.max_batch_tokens))
    kinds = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.9))
    for seq_id, params in enumerate(kinds):
        on_progress(LoadProgress("warm-up", seq_id / len(kinds)))
        start = Start(seq_id, (0,) * length, params, num_prompt_tokens=length)
        blocks = tuple(range(min(2, info.num_blocks)))
        backend.forward(Batch((Chunk(seq_id, 0, length, blocks),), (start,))).result()
        if length < len(blocks) * info.block_size:
            backend.forward(Batch((Chunk(seq_id, length, 1),))).result()
        backend.forward(Batch((), released=(seq_id,))).result()
    on_progress(LoadProgress("warm-up", 1.0))
