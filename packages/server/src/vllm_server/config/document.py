"""The settings for people and editors: `--print-config`, reference, example, JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from vllm_server.config.fields import Field, all_fields
from vllm_server.config.load import CONFIG_PATH_VARIABLE, Configuration
from vllm_server.config.unavailable import UNAVAILABLE
from vllm_server.config.uses import USES, summary
from vllm_server.config.values import limits

MASK = "***"


def effective(configuration: Configuration, paths: Collection[str]) -> str:
    """The values of these settings as YAML with their origin as a comment; secrets are masked."""
    lines: list[str] = []
    for section, fields in _sections():
        shown = [field for field in fields if field.path in paths]
        lines += [f"{section}:"] if shown else []
        for field in shown:
            value = getattr(getattr(configuration.settings, section), field.key)
            origin = configuration.origins.get(field.path, "default")
            lines.append(f"  {field.key}: {_shown(field, value)}  # {origin}")
    return "\n".join(lines)


def _shown(field: Field, value: Any) -> str:
    """JSON is YAML."""
    if field.secret and value:
        return json.dumps([MASK] * len(value) if field.is_list else MASK)
    return json.dumps(value, ensure_ascii=False)


_INTRODUCTION = f"""\
# Configuration

<!-- Written by `python -m vllm_server.config --markdown`; edit the schema instead. -->

A value comes from the strongest source that gives it: flags, then the environment, then the YAML
file, then the default. Only API keys of all sources count together.

- YAML: `--config FILE` (`-c`) or `{CONFIG_PATH_VARIABLE}`; two levels, `section: {{key: value}}`.
- Environment: `VLLM_LITE_<SECTION>_<KEY>` for every setting, such as `VLLM_LITE_SERVER_PORT`; it
  beats the shorter variables in the tables.
- Flags: `--x value` or `--x=value`, with dashes or underscores; `--x` and `--no-x` for switches.
  Flags marked repeatable add up; lists may also be written with commas. Of another flag that is
  repeated, the last value counts.
- Sizes: `4k` is 4000, `4K` is 4096, `2G` is 2 GiB.
- Every flag in the tables that starts with two dashes is also a YAML key, written with underscores.
  Two names of one setting with different values in one source are an error.
- `--cpu` stands for `--device cpu`, `--disable-shutdown-endpoint` for `--no-shutdown-endpoint`;
  both are flags alone.

`--print-config` shows every value that the command uses and where it came from. An unknown name, or
a value out of range, ends the start with exit code 2 and the nearest name. For completion in
editors: `python -m vllm_server.config --json-schema`.
"""


def markdown() -> str:
    """The reference of all settings."""
    return _INTRODUCTION + "\n".join([*_uses(), *_tables(), *_refusals()]) + "\n"


def _uses() -> Iterator[str]:
    yield from (
        "",
        "## What each command takes",
        "",
        "The flag of a setting that a command does not use ends it with exit code 2. A YAML file",
        "and the environment are shared by all commands and may hold settings for any of them.",
        "",
        "| `vllm-lite` | settings that may be given as flags |",
        "|---|---|",
    )
    for use in USES.values():
        yield f"| `{use.command}` | {summary(use.paths)} |"
        for mode in use.modes:
            yield f"| `{use.command}` {mode.words} | {summary(use.paths - mode.unused)} |"


def _tables() -> Iterator[str]:
    for section, fields in _sections():
        yield from (
            "",
            f"## `{section}`",
            "",
            "| key | flags | environment | default | meaning |",
            "|---|---|---|---|---|",
        )
        for field in fields:
            flags = ", ".join(f"`{flag}`" for flag in field.flags)
            env = ", ".join(f"`{name}`" for name in field.seed_env)
            default = "–" if field.default in (None, (), "") else f"`{json.dumps(field.default)}`"
            yield f"| `{field.key}` | {flags} | {env} | {default} | {_meaning(field)} |"


def _meaning(field: Field) -> str:
    words = [field.help]
    if field.choices:
        words.append(f"One of {', '.join(f'`{choice}`' for choice in field.choices)}.")
    if limits(field):
        words.append(f"{limits(field).capitalize()}.")
    return " ".join(words).replace("|", "\\|")


def _refusals() -> Iterator[str]:
    yield from (
        "",
        "## Not available in this version",
        "",
        "These names are known and refused, so that nothing is accepted and ignored.",
        "",
        "| flags | YAML keys | accepted value |",
        "|---|---|---|",
    )
    for entry in UNAVAILABLE:
        flags = ", ".join(f"`{flag}`" for flag in entry.flags)
        keys = ", ".join(f"`{key}`" for key in entry.keys)
        yield f"| {flags} | {keys} | {', '.join(f'`{n}`' for n in entry.neutral) or '–'} |"


def example() -> str:
    """A YAML file with every setting, each commented out at its default."""
    lines = [
        "# Every setting with its default; remove a # to change one. They are explained in",
        "# docs/configuration.md. Written by `python -m vllm_server.config --example`.",
    ]
    for section, fields in _sections():
        lines += ["", f"{section}:"]
        lines += [f"  # {field.key}: {json.dumps(field.default)}" for field in fields]
    return "\n".join(lines) + "\n"


_JSON_TYPES = {
    "bool": {"type": "boolean"},
    "int": {"type": ["integer", "string"]},
    "float": {"type": "number"},
    "text": {"type": "string"},
    "texts": {"type": "array", "items": {"type": "string"}},
    "keys": {"type": "array", "items": {"type": ["string", "object"]}},
}


def json_schema() -> dict[str, Any]:
    """A JSON Schema of the YAML file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "vllm-lite configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            section: {
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {name: _property(f) for f in fields for name in f.names},
            }
            for section, fields in _sections()
        },
    }


def _property(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {**_JSON_TYPES[field.kind], "description": field.help}
    if field.choices:
        schema["enum"] = [int(c) if field.kind == "int" else c for c in field.choices]
    if field.low is not None:
        schema["minimum"] = field.low
    if field.high is not None:
        schema["maximum"] = field.high
    if field.default not in (None, ()):
        schema["default"] = field.default
    return schema


def _sections() -> Iterator[tuple[str, list[Field]]]:
    for section in dict.fromkeys(field.section for field in all_fields()):
        yield section, [field for field in all_fields() if field.section == section]
