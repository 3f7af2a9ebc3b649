"""What the server says when it is ready, and what it warns about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from vllm_server.config import Settings
from vllm_server.config.check import is_loopback
from vllm_server.self_check import Findings

if TYPE_CHECKING:
    from vllm_models import MemoryReport

_DEMO = (
    "This is the embedded demonstration model: it answers about vllm-lite and little else. "
    "Serve a real one with --model PATH_OR_HUB_ID."
)


def banner(
    settings: Settings,
    name: str,
    memory: MemoryReport,
    findings: Findings,
    seconds: Mapping[str, float],
    addresses: Sequence[str],
) -> Iterator[str]:
    """Lines about what is served, on what, and where.

    Args:
        settings: The whole configuration.
        name: The model's name in the API.
        memory: What the backend holds.
        findings: What is known about its results.
        seconds: How long each part of the start took.
        addresses: Where clients find the server.
    """
    mb = 1 / 2**20
    yield f"vllm-lite {version('vllm-server')} serves {name}"
    engine = settings.engine
    if engine.model == "builtin" and not (engine.weight_path or engine.gguf_file):
        yield _DEMO
    yield (
        f"Model: {memory.weight_bytes * mb:.1f} MB of weights, {memory.dtype} on {memory.device}, "
        f"sequences up to {memory.max_model_len} tokens"
    )
    yield (
        f"KV cache: {memory.num_blocks} blocks x {memory.block_size} tokens = {memory.num_tokens} "
        f"tokens of {memory.kv_dtype}, {memory.kv_bytes * mb:.1f} MB; "
        f"{memory.max_concurrency:.1f} sequences of full length at once"
    )
    yield from findings.lines()
    parts = ", ".join(f"{part} {spent:.2f} s" for part, spent in seconds.items())
    yield f"Start: {sum(seconds.values()):.2f} s ({parts})"
    yield f"Listening on {' and '.join(addresses)} (API under /v1, reference at /docs)"


def exposure_warning(settings: Settings) -> str | None:
    """A sentence if strangers can reach the API without a key."""
    server, auth = settings.server, settings.auth
    if server.uds or is_loopback(server.host):
        return None
    if auth.api_keys or auth.admin_keys or auth.api_keys_file:
        return None
    return (
        f"Anyone who reaches {server.host} may use this server: there are no keys. Give --api-key, "
        "or listen on this machine only with --host 127.0.0.1."
    )
