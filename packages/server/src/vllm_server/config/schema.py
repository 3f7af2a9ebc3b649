"""Every setting of the server, once: type, default, range, names and help.

The YAML keys, flags, environment variables, `--help`, `--print-config` and `docs/configuration.md`
are all derived from here. Knows no source of values; see `vllm_server.config.load`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    env: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """A dataclass field with what its sources need to know.

    Args:
        default: Value where no source gives one; a tuple makes the setting a list.
        help: One line for `--help` and the documentation.
        flags: Other spellings of the flag; the first is shown. Without any, the flag is the
            field's name with dashes.
        env: Well-known environment variables; `VLLM_LITE_<SECTION>_<KEY>` always works and wins.
        low: Smallest allowed number.
        high: Largest allowed number.
        choices: Allowed words or numbers, as text.
        secret: Never printed.
    """
    metadata = {
        "help": help,
        "flags": flags,
        "env": env,
        "low": low,
        "high": high,
        "choices": choices,
        "secret": secret,
    }
    return field(default=default, metadata=metadata)


LOG_LEVELS = ("trace", "debug", "info", "warn", "error")


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The section `server`: sockets, limits and logs."""

    host: str = setting("0.0.0.0", "Address to listen on.", env=("VLLM_HOST",))
    port: int = setting(
        8000,
        "Port to listen on; 0 picks a free one and prints it.",
        flags=("--port", "-p"),
        env=("VLLM_PORT",),
        low=0,
        high=65535,
    )
    uds: str | None = setting(None, "Listen on this Unix socket instead of host and port.")
    log_level: str = setting(
        "info",
        "Least severe log lines to show.",
        flags=("--log-level", "--log"),
        env=("VLLM_LOG_LEVEL",),
        choices=LOG_LEVELS,
    )
    log_format: str = setting("text", "Log lines as text or JSON.", choices=("text", "json"))
    served_model_name: tuple[str, ...] = setting(
        (), "Names the API accepts for the model; the first one is shown. Repeatable."
    )
    shutdown_timeout_secs: float = setting(
        30.0,
        "Seconds that running streams get to finish after SIGTERM or /shutdown.",
        flags=("--shutdown-timeout", "--drain-timeout", "--shutdown-drain-grace-secs"),
        low=0,
        high=3600,
    )
    shutdown_endpoint: bool = setting(True, "Mount /shutdown.")
    hardened: bool = setting(
        False,
        "Strict profile: loopback unless keys exist, keys of 16 characters or more, "
        "no /shutdown, docs and metrics with a key only.",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "Names in the Host header to answer to; others get 421. Repeatable."
    )
    cors_origins: tuple[str, ...] = setting((), "Origins allowed by CORS, or *. Repeatable.")
    max_body_size_mb: float = setting(32.0, "Largest request body in MiB.", low=0.01, high=4096)
    request_timeout: float = setting(
        600.0, "Seconds until the first token before a request is answered with 504.", low=0.1
    )
    max_num_queued_reqs: int = setting(
        1024, "Requests that may wait; more are answered with 503.", low=1
    )
    max_connections: int = setting(1024, "Connections held at once.", low=1)
    sse_keep_alive_interval: float = setting(
        15.0, "Seconds of silence after which a stream gets a comment line; 0 is never.", low=0
    )
    strict_params: bool = setting(False, "Refuse unknown request parameters instead of warning.")
    max_logprobs: int = setting(20, "Largest `logprobs` or `top_logprobs` of a request.", low=0)
    embeddings: bool = setting(True, "Answer /v1/embeddings; without it 501.")
    root_path: str = setting("", "Path prefix under which a proxy serves this server.")
    metrics_public: bool = setting(False, "Serve /metrics without a key.")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The section `engine`: model, memory and scheduling."""

    model: str = setting(
        "builtin",
        "Hub id, folder, .gguf file, or `builtin` for the embedded demonstration model.",
        flags=("--model", "-m", "--m"),
        env=("VLLM_MODEL",),
    )
    weight_path: str | None = setting(
        None,
        "Folder with weights, or .gguf file; wins over `model`.",
        flags=("--weight-path", "--w", "--model-path"),
    )
    gguf_file: str | None = setting(
        None,
        "GGUF file in the Hub model or folder; without either, the path of a file.",
        flags=("--gguf-file", "--f"),
    )
    revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    download_dir: str | None = setting(
        None, "Where Hub models are kept; the Hub's own cache if absent.", env=("HF_HUB_CACHE",)
    )
    offline: bool = setting(False, "Never ask the Hub.", env=("HF_HUB_OFFLINE",))
    hf_token: str | None = setting(None, "Hub token.", env=("HF_TOKEN",), secret=True)
    hf_token_path: str | None = setting(
        None, "File that holds the Hub token; wins over `hf_token`."
    )
    device: str = setting("auto", "Where the model runs.", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = setting(
        "auto",
        "Element type of weights, and of the KV cache unless `kv_cache_dtype` says more.",
        choices=(
            "auto", "bf16", "f16", "f32", "bfloat16", "float16", "half", "float32", "float",
        ),
    )  # fmt: skip
    kv_cache_dtype: str = setting(
        "auto",
        "How keys and values are kept: `auto` is the type of the weights; `int8` and `fp8` (CUDA) "
        "take half of bf16, with a scale per position and head.",
        choices=("auto", "int8", "fp8"),
    )
    kv_quantization: bool = setting(
        False, "Same as `kv_cache_dtype: int8`.", env=("VLLM_KV_QUANTIZATION",)
    )
    fp8_kvcache: bool = setting(False, "Same as `kv_cache_dtype: fp8`.")
    enforce_eager: bool = setting(
        False, "Walk through the model's layers in every step; no decode step is recorded."
    )
    isq: str | None = setting(
        None,
        "Quantize plain weights while loading: q2k, q3k, q4k, q5k, q6k, q8_0, q4_0, q4_1, q5_0 or "
        "q5_1.",
        flags=("--isq", "--quant"),
    )
    max_num_seqs: int | None = setting(
        None,
        "Sequences that run at once; by device 256 (cuda), 32 (cpu) or 8 (mps).",
        flags=("--max-num-seqs", "--max-requests", "--max-batch-size"),
        low=1,
        high=65536,
    )
    max_model_len: int | None = setting(
        None, "Longest sequence in tokens; the model's own, or what fits in memory.", low=1
    )
    max_tokens: int | None = setting(
        None,
        "Ceiling of every completion; without it a chat request that names none gets 4096.",
        low=1,
    )
    max_num_batched_tokens: int | None = setting(
        None, "Positions computed per step; 8192 on cuda, else 512.", low=16
    )
    num_kv_blocks: int | None = setting(
        None,
        "KV blocks; by default as many as fit in memory, and no more than the sequences that run "
        "at once can fill.",
        flags=("--num-kv-blocks", "--num-blocks", "--kv-blocks"),
        env=("VLLM_KV_BLOCKS",),
        low=1,
        high=2**24,
    )
    block_size: int | None = setting(
        None,
        "Positions per KV block; 64 on cuda, else 16.",
        choices=("16", "32", "64", "128"),
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "Share of the device's free memory for weights and KV cache.",
        flags=("--gpu-memory-utilization", "--kv-fraction"),
        low=0.01,
        high=1.0,
    )
    kv_cache_memory: int | None = setting(
        None,
        "Bytes for the KV cache, such as 2G, instead of a share of memory; `num_kv_blocks` wins.",
        low=1,
    )
    cpu_mem_fold: float | None = setting(
        None,
        "Host memory for KV blocks that the cache has no room for, as a multiple of the cache; at "
        "most half of the free memory.",
        low=0.1,
        high=10.0,
    )
    prefix_cache: bool = setting(True, "Reuse KV blocks of equal prefixes.")
    context_cache: bool = setting(False, "Pin the blocks of a `session_id` between its turns.")
    share_prefix_cache: bool = setting(False, "Let different API keys share cached prefixes.")
    scheduling_policy: str = setting(
        "fcfs", "Order of waiting requests.", choices=("fcfs", "priority", "shortest")
    )
    speculation: str = setting(
        "off", "Guess tokens ahead: `ngram` looks for repeats.", choices=("off", "ngram")
    )
    num_speculative_tokens: int = setting(3, "Tokens to guess per step.", low=1, high=64)
    max_draft_tokens: int = setting(
        8,
        "Upper bound on guessed tokens; 0 switches speculation off.",
        env=("VLLM_MAX_DRAFT_TOKENS",),
        low=0,
        high=64,
    )
    overlap: bool = setting(True, "Plan the next step while the device works on this one.")
    num_threads: int | None = setting(
        None, "Threads of the CPU backend; one for a small model, else all cores.", low=1
    )
    deterministic: bool = setting(
        False,
        "Sum in an order that the batch does not change, also where another is faster (a GPU), and "
        "refuse to start where that cannot be; on a CPU with its kernels it is always so.",
    )
    self_check: bool = setting(
        False,
        "Before serving, run a request in several ways and compare every bit, and measure the "
        "kernels.",
    )
    chat_template: str | None = setting(None, "Jinja file that replaces the model's template.")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The section `sampling`: defaults for requests that do not say."""

    temperature: float | None = setting(None, "Default temperature.", low=0.0, high=2.0)
    top_k: int | None = setting(None, "Default top-k.", low=-1)
    top_p: float | None = setting(None, "Default top-p.", low=1e-9, high=1.0)
    min_p: float | None = setting(None, "Default min-p.", low=0.0, high=1.0)
    presence_penalty: float | None = setting(None, "Default presence penalty.", low=-2.0, high=2.0)
    frequency_penalty: float | None = setting(
        None, "Default frequency penalty.", low=-2.0, high=2.0
    )
    repetition_penalty: float | None = setting(
        None,
        "Default repetition penalty.",
        flags=("--repetition-penalty", "--penalty"),
        low=1e-6,
    )
    seed: int | None = setting(None, "Seed of requests that name none.")


@dataclass(frozen=True, slots=True)
class AuthSettings:
    """The section `auth`: who may call what, and how often."""

    api_keys: tuple[Any, ...] = setting(
        (),
        "Accepted keys: a string, sha256:<hex>, or {name, key, scopes, limits}. Repeatable.",
        flags=("--api-key",),
        env=("VLLM_API_KEY",),
        secret=True,
    )
    api_keys_file: str | None = setting(
        None,
        "File with one key per line; read again on SIGHUP.",
        flags=("--api-key-file",),
        env=("VLLM_API_KEYS_FILE",),
    )
    admin_keys: tuple[Any, ...] = setting(
        (),
        "Keys with every right. Repeatable.",
        flags=("--admin-key",),
        env=("VLLM_ADMIN_KEY",),
        secret=True,
    )
    rate_limit_requests: int | None = setting(
        None, "Requests per key and window; 100 once keys exist, 0 is off.", low=0
    )
    rate_limit_window_secs: float | None = setting(
        None, "Length of the sliding window in seconds; 60 if absent.", low=0.1
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration; built once, never changed."""

    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    auth: AuthSettings = field(default_factory=AuthSettings)
