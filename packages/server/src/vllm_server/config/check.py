"""Rules that need more than one setting, and the strict profile `hardened`.

Runs after merging and before anything is opened or loaded; a rule that fails is a `ConfigError`.
"""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path

from vllm_models.gguf.mixture import find_isq
from vllm_traits import ConfigError

from vllm_server.config.load import Configuration
from vllm_server.config.schema import EngineSettings, Settings
from vllm_server.ops.auth import KeyRing


def check(configuration: Configuration) -> Configuration:
    """The configuration with the strict profile applied, if it is asked for.

    Raises:
        ConfigError: Two settings contradict each other, or a named file is missing.
    """
    configuration = _with_kv_cache_dtype(configuration)
    settings = configuration.settings
    _check_model(settings.engine)
    _check_files(settings)
    num_keys = len(KeyRing(settings.auth, settings.server.hardened))
    return _hardened(configuration, num_keys) if settings.server.hardened else configuration


def _with_kv_cache_dtype(configuration: Configuration) -> Configuration:
    """The two switches that stand for a type of the KV cache, as that type."""
    engine, origins = configuration.settings.engine, dict(configuration.origins)
    switches = {"kv_quantization": "int8", "fp8_kvcache": "fp8"}
    wanted = {dtype: name for name, dtype in switches.items() if getattr(engine, name)}
    if engine.kv_cache_dtype != "auto" or "engine.kv_cache_dtype" in origins:
        wanted[engine.kv_cache_dtype] = "kv_cache_dtype"
    if len(wanted) > 1:
        asked = " and ".join(f"engine.{name} ({dtype})" for dtype, name in wanted.items())
        raise ConfigError(f"{asked} contradict each other; keep one of them.")
    for dtype, name in wanted.items():
        engine = replace(engine, kv_cache_dtype=dtype)
        if origin := origins.get(f"engine.{name}"):
            origins["engine.kv_cache_dtype"] = origin
    settings = replace(configuration.settings, engine=engine)
    return replace(configuration, settings=settings, origins=origins)


def _check_model(engine: EngineSettings) -> None:
    if engine.isq is not None:
        find_isq(engine.isq)
    file = engine.gguf_file
    if file is None:
        return
    if not file.lower().endswith(".gguf"):
        raise ConfigError(f"engine.gguf_file: {file!r} is not the name of a .gguf file.")
    model = engine.weight_path or engine.model
    if model.lower().endswith(".gguf"):
        raise ConfigError(f"engine.gguf_file is {file!r}, but the model is {model!r} already.")


def _check_files(settings: Settings) -> None:
    files = {
        "engine.hf_token_path": settings.engine.hf_token_path,
        "engine.chat_template": settings.engine.chat_template,
        "auth.api_keys_file": settings.auth.api_keys_file,
    }
    for path, file in files.items():
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"{path}: there is no file {file!r}.")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hardened(configuration: Configuration, num_keys: int) -> Configuration:
    """Loopback unless there are keys, long keys, no HTTP shutdown, nothing readable without key."""
    settings, origins = configuration.settings, dict(configuration.origins)
    server = settings.server
    for key in ("shutdown_endpoint", "metrics_public"):
        if getattr(server, key) and f"server.{key}" in origins:
            origin = origins[f"server.{key}"]
            raise ConfigError(f"{origin}: server.{key} is not allowed with server.hardened.")
    host = server.host
    if "server.host" not in origins:
        host = "127.0.0.1"
        origins["server.host"] = "server.hardened"
    if not num_keys and not server.uds and not is_loopback(host):
        raise ConfigError(
            f"server.hardened listens beyond this machine ({host}) only with keys; give --api-key "
            "or --host 127.0.0.1."
        )
    origins["server.shutdown_endpoint"] = "server.hardened"
    strict = replace(server, host=host, shutdown_endpoint=False)
    return replace(configuration, settings=replace(settings, server=strict), origins=origins)
