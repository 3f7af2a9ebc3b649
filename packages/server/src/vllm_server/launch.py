"""From settings to a loaded model: the one place that knows every package.

Loads and assembles; owns no thread and no socket. Torch is imported here, by the call, so that
commands that only parse or print stay instant.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_core import AsyncEngine, SchedulerConfig
from vllm_models import BackendOptions
from vllm_models.gguf.header import read_header
from vllm_models.gguf_files import is_gguf, model_name
from vllm_models.options import OnProgress
from vllm_models.threads import wait_briefly
from vllm_traits import ModelError

from vllm_server.background import in_background
from vllm_server.config import EngineSettings, SamplingSettings, Settings
from vllm_server.self_check import Findings, examine
from vllm_server.service import ModelCard, Service
from vllm_server.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from vllm_models import MemoryReport, TorchBackend

log = logging.getLogger(__name__)

BUILTIN = "builtin"
BUILTIN_NAME = "vllm-lite-demo"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to be put behind an engine.

    Attributes:
        folder: Where its files are, or its GGUF file.
        backend: Runs it.
        tokenizer: Its text side.
        scheduler: How an engine should share it.
        sampling: Defaults for requests that do not say: the operator's, else the model's own.
        findings: What is known about its results.
    """

    folder: Path
    backend: TorchBackend
    tokenizer: Tokenizer
    scheduler: SchedulerConfig
    sampling: SamplingSettings
    findings: Findings

    @property
    def memory(self) -> MemoryReport:
        """What it holds."""
        return self.backend.memory


def model_names(settings: Settings) -> tuple[str, ...]:
    """Names the API accepts for the model; the first one is shown."""
    if settings.server.served_model_name:
        return settings.server.served_model_name
    name = model_source(settings.engine)
    if name == BUILTIN:
        return (BUILTIN_NAME,)
    path = Path(name).expanduser()
    if path.is_dir() and settings.engine.gguf_file:
        path = Path(settings.engine.gguf_file)
    if is_gguf(path):
        return (model_name(path),)
    return (path.resolve().name,) if path.is_dir() else (name,)


def model_source(engine: EngineSettings) -> str:
    """What to load: a folder of weights wins over a model's name, and a file may be alone."""
    name = engine.weight_path or engine.model
    return engine.gguf_file if name == BUILTIN and engine.gguf_file else name


def load_model(settings: Settings, on_progress: OnProgress) -> LoadedModel:
    """Download if need be, load, size the KV pool, warm up.

    Raises:
        ModelError: The model is not there or cannot be loaded.
        DeviceError: The device is missing or too small, or fails the self-check.
        ConfigError: A setting does not fit the model.
    """
    wait_briefly()
    from vllm_models import load_backend

    engine = settings.engine
    folder = find_model(engine, on_progress=on_progress)
    template = Path(engine.chat_template).read_text("utf-8") if engine.chat_template else None
    tokenizer = Tokenizer(folder, template)
    backend = load_backend(backend_options(engine, folder), on_progress)
    for note in backend.memory.notes:
        log.info("%s", note)
    findings = examine(backend, engine.self_check, engine.deterministic, on_progress)
    sampling = sampling_defaults(settings.sampling, folder)
    return LoadedModel(folder, backend, tokenizer, scheduler_config(settings), sampling, findings)


def find_model(
    engine: EngineSettings, name: str | None = None, on_progress: OnProgress | None = None
) -> Path:
    """Where the model's files are, or its GGUF file, after downloading them if need be.

    Args:
        engine: Says which model, and how the Hub is reached.
        name: A model instead of the settings' own.
        on_progress: Told about the download.

    Raises:
        ModelError: It is nowhere.
    """
    from vllm_models import resolve_model

    return resolve_model(
        name or engine.weight_path or engine.model,
        file=None if name else engine.gguf_file,
        revision=engine.revision,
        download_dir=Path(engine.download_dir) if engine.download_dir else None,
        offline=engine.offline,
        token=hub_token(engine),
        on_progress=on_progress,
    )


def start_loading(settings: Settings, on_progress: OnProgress) -> Future[LoadedModel]:
    """`load_model` on a thread that ends with it.

    A thread that enters parallel work makes a pool of workers for itself, which live as long as
    the thread; later all such work is the engine's.
    """
    return in_background(lambda: load_model(settings, on_progress), "load")


def hub_token(engine: EngineSettings) -> str | None:
    """The Hub token, from its file if there is one."""
    if engine.hf_token_path:
        return Path(engine.hf_token_path).expanduser().read_text("utf-8").strip()
    return engine.hf_token


@dataclass(frozen=True, slots=True)
class _DeviceDefaults:
    """What suits a kind of device."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


_DEFAULTS = {
    "cpu": _DeviceDefaults(16, 32, 512),
    "cuda": _DeviceDefaults(64, 256, 8192),
    "mps": _DeviceDefaults(16, 8, 512),
}


def backend_options(engine: EngineSettings, folder: Path) -> BackendOptions:
    """The backend's share of the settings, with the defaults of the device it will run on."""
    from vllm_models.device import pick_device

    defaults = _DEFAULTS[pick_device(engine.device).type]
    return BackendOptions(
        model=folder,
        dtype=engine.dtype,
        kv_cache_dtype=engine.kv_cache_dtype,
        device=engine.device,
        num_blocks=engine.num_kv_blocks,
        block_size=engine.block_size or defaults.block_size,
        memory_fraction=engine.gpu_memory_utilization,
        kv_cache_memory=engine.kv_cache_memory,
        max_model_len=engine.max_model_len,
        max_sequences=engine.max_num_seqs or defaults.max_num_seqs,
        max_batch_tokens=engine.max_num_batched_tokens or defaults.max_num_batched_tokens,
        threads=engine.num_threads,
        isq=engine.isq,
        enforce_eager=engine.enforce_eager,
        deterministic=engine.deterministic,
        host_kv_share=engine.cpu_mem_fold,
    )


def scheduler_config(settings: Settings) -> SchedulerConfig:
    """The engine's share of the settings."""
    engine = settings.engine
    drafts = min(engine.num_speculative_tokens, engine.max_draft_tokens)
    return SchedulerConfig(
        policy=engine.scheduling_policy,  # pyright: ignore[reportArgumentType] - checked words
        max_waiting=settings.server.max_num_queued_reqs,
        overlap=engine.overlap,
        prefix_cache=engine.prefix_cache,
        num_ngram_drafts=drafts if engine.speculation == "ngram" else 0,
    )


# What `generation_config.json` calls a default, and GGUF metadata.
_MODEL_DEFAULTS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def sampling_defaults(sampling: SamplingSettings, model: Path) -> SamplingSettings:
    """What the operator set, and for the rest what the model's own files recommend.

    Args:
        sampling: Of the operator.
        model: Folder with a `generation_config.json`, or a GGUF file.

    Raises:
        ModelError: The file is no JSON object, or no GGUF.
    """
    recommended = _recommended(model)
    missing = {
        name: recommended[name]
        for name in _MODEL_DEFAULTS
        if getattr(sampling, name) is None and _is_number(recommended.get(name))
    }
    return replace(sampling, **missing)


def _recommended(model: Path) -> dict[str, Any]:
    if model.is_file():
        metadata = read_header(model, tensors=False).metadata
        return {name: metadata.get(key) for name, key in _MODEL_DEFAULTS.items()}
    path = model / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError):
        raise ModelError(f"{path} is not a JSON object.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def start_engine(model: LoadedModel) -> AsyncEngine:
    """The engine, running on its thread."""
    engine = AsyncEngine(model.backend, model.scheduler)
    engine.start()
    return engine


def make_service(settings: Settings, model: LoadedModel, engine: AsyncEngine) -> Service:
    """What the HTTP layer serves."""
    config, pooling = model.backend.loaded.config, model.backend.loaded.default_pooling
    memory = model.memory
    card = ModelCard(
        names=model_names(settings),
        root=model_source(settings.engine),
        max_model_len=memory.max_model_len,
        vocab_size=model.backend.info.vocab_size,
        fingerprint=f"vllm-lite-{version('vllm-server')}-{model.backend.info.fingerprint.hex()[:8]}",
        hidden_size=config.hidden_size,
        pooling=pooling.pooling if pooling else "mean",
        cache_config={
            "block_size": str(memory.block_size),
            "num_gpu_blocks": str(memory.num_blocks),
            "cache_dtype": memory.kv_dtype,
            "kv_cache_mb": f"{memory.kv_bytes / 2**20:.1f}",
            "num_tokens": str(memory.num_tokens),
            "max_concurrency": f"{memory.max_concurrency:.2f}",
            "enable_prefix_caching": str(settings.engine.prefix_cache),
        },
    )
    return Service(engine, model.tokenizer, card, model.sampling, model.findings)
