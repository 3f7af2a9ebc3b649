"""Which command uses which settings: the one place that says so.

A command takes flags for the settings it uses and refuses those of the others; `--help` and the
reference follow. A YAML file and the environment are shared by all commands and may hold any.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vllm_server.config.fields import Field, all_fields


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run a command in which it uses less than otherwise.

    Attributes:
        own: Name of the command's own flag or argument, as it is written.
        given: Whether the mode is with it or without it.
        unused: Paths of the settings that have no effect then.
    """

    own: str
    given: bool
    unused: frozenset[str]

    @property
    def words(self) -> str:
        """In a sentence: with or without the flag."""
        return f"{'with' if self.given else 'without'} `{self.own}`"

    def holds(self, parsed: argparse.Namespace) -> bool:
        """Whether the command line asks for this mode."""
        value = getattr(parsed, self.own.removeprefix("--").lower())
        return (value is not None and value is not False) is self.given


@dataclass(frozen=True, slots=True)
class Use:
    """The settings of one command.

    Attributes:
        command: Its words after `vllm-lite`.
        paths: Of the settings it uses in at least one mode, such as `engine.model`.
        modes: Where some of them have no effect.
    """

    command: str
    paths: frozenset[str]
    modes: tuple[Mode, ...] = ()

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its settings, in the order of the schema."""
        return tuple(field for field in all_fields() if field.path in self.paths)


def _section(name: str) -> frozenset[str]:
    return frozenset(field.path for field in all_fields() if field.section == name)


def _keys(section: str, keys: str) -> frozenset[str]:
    return frozenset(f"{section}.{key}" for key in keys.split())


_LOGS = _keys("server", "log_level log_format")
_HUB = _keys("engine", "revision download_dir offline hf_token hf_token_path")
_NAME = _keys("engine", "model weight_path gguf_file")
_TEMPLATE = _keys("engine", "chat_template")
_LENGTH = _keys("engine", "max_tokens")
_SESSIONS = _keys("engine", "context_cache")
_KV_TYPE = _keys("engine", "kv_cache_dtype kv_quantization fp8_kvcache")
_SAMPLING = _section("sampling")
_KEYS = _keys("auth", "api_keys")
_TENANTS = _keys("engine", "share_prefix_cache")
# To load a model and run token ids; a new engine setting is one of these unless it is named above.
_RUN = (_section("engine") - _TEMPLATE - _LENGTH - _SESSIONS - _TENANTS) | _LOGS
_ANSWER = _RUN | _TEMPLATE | _LENGTH | _SAMPLING
_REMOTE = _keys("engine", "model") | _LENGTH | _SAMPLING | _KEYS | _LOGS

_ALL = (
    Use("serve", frozenset(field.path for field in all_fields())),
    Use(
        "chat",
        _ANSWER | _SESSIONS | _KEYS,
        (
            Mode("--url", True, (_ANSWER | _SESSIONS) - _REMOTE),
            Mode("--url", False, _KEYS),
        ),
    ),
    Use(
        "completion",
        _ANSWER,
        (
            Mode("--raw", True, _TEMPLATE),
            Mode("--batch", True, _keys("engine", "max_num_seqs")),
        ),
    ),
    Use("generate", _ANSWER, (Mode("--chat", False, _TEMPLATE),)),
    Use("tokenize", _HUB | _NAME | _LOGS),
    Use(
        "info",
        _HUB | _NAME | _KV_TYPE | _keys("engine", "device dtype") | _LOGS,
        (Mode("MODEL", True, _NAME),),
    ),
    Use("quantize", _HUB | _LOGS),
    Use("bench serve", frozenset()),
    Use("bench throughput", _RUN),
    Use("bench latency", _RUN),
)
USES = {use.command: use for use in _ALL}


def unused(use: Use, field: Field, flag: str) -> str:
    """The sentence that refuses a flag which means nothing to a command."""
    others = (other.command for other in _ALL if field.path in other.paths)
    return (
        f"{flag} sets {field.path}, which `vllm-lite {use.command}` does not use; leave it out. "
        f"It is for {_listed(others)}."
    )


def unused_in(use: Use, mode: Mode, field: Field, flag: str) -> str:
    """The sentence that refuses a flag which means nothing in one mode of a command."""
    advice = "leave one of the two out" if mode.given else f"leave it out or add `{mode.own}`"
    return (
        f"{flag} sets {field.path}, which `vllm-lite {use.command}` {mode.words} does not use; "
        f"{advice}."
    )


def _listed(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def summary(paths: Collection[str]) -> str:
    """Settings in a few words: whole sections, or all of one but some, or their keys."""
    parts: list[str] = []
    for section in dict.fromkeys(field.section for field in all_fields()):
        keys = [field.key for field in all_fields() if field.section == section]
        used = [key for key in keys if f"{section}.{key}" in paths]
        others = [key for key in keys if key not in used]
        if not others:
            parts.append(f"all of `{section}`")
        elif len(others) < len(used):
            parts.append(f"`{section}` without {_listed(others)}")
        elif used:
            parts.append(_listed(f"{section}.{key}" for key in used))
    return "; ".join(parts) or "none"
