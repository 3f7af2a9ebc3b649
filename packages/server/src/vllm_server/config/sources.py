"""Reads YAML and the environment into raw values with their origin.

Refuses unknown names; knows nothing of types and ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vllm_traits import ConfigError

from vllm_server.config.fields import Field, all_fields
from vllm_server.config.names import nearest, sentence
from vllm_server.config.unavailable import UNAVAILABLE, Unavailable

PREFIX = "VLLM_LITE_"
# What the kernels of a CPU read for themselves, because it is of the machine, not of a server.
_OF_KERNELS = frozenset({"VLLM_LITE_CACHE", "VLLM_LITE_NATIVE", "VLLM_LITE_TRITON"})


class Given(NamedTuple):
    """One value of one source.

    Attributes:
        field: The setting it is for.
        raw: As the source has it.
        origin: Where it stands, for messages and `--print-config`.
    """

    field: Field
    raw: object
    origin: str


def from_own_environment(environ: Mapping[str, str]) -> list[Given]:
    """Values of `VLLM_LITE_<SECTION>_<KEY>`; an empty variable is an absent one."""
    known = {variable: f for f in all_fields() for variable in f.variables}
    refused = {variable for u in UNAVAILABLE for variable in u.variables}
    others = {*known, *refused, *_OF_KERNELS}
    for name in environ:
        if name.startswith(PREFIX) and name not in others:
            raise ConfigError(
                sentence(f"Unknown environment variable {name}{nearest(name, known)}")
            )
    return [
        Given(field, environ[name], f"environment {name}")
        for name, field in known.items()
        if environ.get(name)
    ]


def from_seed_environment(environ: Mapping[str, str]) -> tuple[list[Given], list[str]]:
    """Values of well-known variables such as `VLLM_PORT`, and warnings about ignored ones."""
    for entry in UNAVAILABLE:
        for name in entry.variables:
            if environ.get(name):
                refuse(entry, environ[name], f"environment {name}")
    given: list[Given] = []
    warnings: list[str] = []
    for field in all_fields():
        for name in field.seed_env:
            raw = environ.get(name)
            if raw and "://" in raw and field.key == "port":
                warnings.append(
                    f"{name}={raw} is ignored: it looks injected by Kubernetes for a service of "
                    f"that name. Use {field.variables[0]} to set the port."
                )
            elif raw:
                given.append(Given(field, raw, f"environment {name}"))
    return given, warnings


def refuse(entry: Unavailable, raw: object, origin: str) -> None:
    """Raise if a value asks for a feature that is not there."""
    if entry.refuses(raw):
        raise ConfigError(f"{origin}: {entry.message}")


def from_yaml(path: Path) -> list[Given]:
    """Values of a YAML file; unknown sections and keys are errors with line and column."""
    from vllm_server.config.yaml_file import read_entries  # PyYAML costs start-up time

    known = {f"{f.section}.{name}": f for f in all_fields() for name in f.names}
    refused = {key: entry for entry in UNAVAILABLE for key in entry.keys}
    names = (*known, *refused)
    sections = {name.partition(".")[0] for name in names}
    given: list[Given] = []
    for entry in read_entries(path):
        dotted = f"{entry.section}.{entry.key}"
        if dotted in known:
            given.append(Given(known[dotted], entry.value, f"{entry.place} {dotted}"))
        elif dotted in refused:
            refuse(refused[dotted], entry.value, f"{entry.place} {dotted}")
        elif entry.section not in sections:
            hint = nearest(entry.section, sections)
            raise ConfigError(sentence(f"{entry.place}: unknown section {entry.section!r}{hint}"))
        else:
            hint = nearest(dotted, names)
            raise ConfigError(sentence(f"{entry.place}: unknown key {dotted!r}{hint}"))
    return given
