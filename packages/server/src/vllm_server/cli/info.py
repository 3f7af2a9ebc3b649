"""`vllm-lite info`: what a model is and whether it fits this machine, without loading weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser

if TYPE_CHECKING:
    from vllm_models.describe import Description


def run(argv: Sequence[str]) -> int:
    """The exit code is 0 unless the model cannot be read."""
    parser = FlagParser("info", "Describe a model from its headers; loads no weights.")
    parser.usage = "vllm-lite info [flags] [MODEL]"
    parser.add_argument("model", nargs="?", default=None, help="As --model.", metavar="MODEL")
    parser.add_switch("--json", default=False, help="Print one JSON object.")
    parsed, configuration = settings.read(parser, argv, {"server.log_level": "warn"})

    from vllm_models.describe import describe

    from vllm_server.launch import find_model

    path = find_model(configuration.settings.engine, parsed.model)
    engine = configuration.settings.engine
    found = describe(path, engine.dtype, engine.device, engine.kv_cache_dtype)
    print(json.dumps(_fields(found)) if parsed.json else _table(found))
    return 0


def _fields(found: Description) -> dict[str, Any]:
    config = found.config
    return {
        "path": str(found.path),
        "architecture": config.architecture,
        "format": found.format,
        "parameters": found.num_parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "weight_bytes": found.weight_bytes,
        "tensor_groups": {
            group.name: {
                "tensors": group.num_tensors,
                "bytes": group.num_bytes,
                "bytes_by_type": group.kinds,
            }
            for group in found.groups
        },
        "kv_dtype": found.kv_dtype,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "device": found.device,
        "free_bytes": found.free_bytes,
        "kv_tokens_that_fit": found.tokens_that_fit,
    }


def _table(found: Description) -> str:
    c = found.config
    heads = f"{c.num_heads} heads over {c.num_kv_heads} KV heads of {c.head_dim}"
    lines = [
        str(found.path),
        _line(
            "architecture", f"{c.architecture}: {c.num_layers} layers of {c.hidden_size}, {heads}"
        ),
        _line("parameters", f"{_count(found.num_parameters)}, vocabulary of {c.vocab_size:,}"),
        _line("weights", f"{_size(found.weight_bytes)} in {found.format}"),
    ]
    for group in found.groups:
        kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in group.kinds.items())
        lines.append(_line(f"  {group.name}", f"{group.num_tensors} tensors: {kinds}"))
    return "\n".join(
        [
            *lines,
            _line("context", f"{c.max_position:,} tokens"),
            _line("KV cache", f"{_size(found.kv_bytes_per_token)} per token in {found.kv_dtype}"),
            _line("this machine", _verdict(found)),
        ]
    )


def _verdict(found: Description) -> str:
    free = f"{_size(found.free_bytes)} free on {found.device}"
    if found.weight_bytes > found.free_bytes * 0.9:
        advice = "take a smaller or quantized model, or serve it with --isq"
        return f"{free}: the weights do not fit; {advice}"
    tokens = found.tokens_that_fit
    full = tokens / found.config.max_position
    return (
        f"{free}: the weights fit, and KV for {tokens:,} tokens beside them, "
        f"{full:.1f} sequences of full length"
    )


def _line(name: str, text: str) -> str:
    return f"  {name:<16}{text}"


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.2f} {unit}"
    return f"{num_bytes} bytes"
