"""Merges the four sources into one `Settings`: flags > environment > YAML > defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_traits import ConfigError

from vllm_server.config.fields import Field, all_fields
from vllm_server.config.names import sentence
from vllm_server.config.schema import (
    AuthSettings,
    EngineSettings,
    SamplingSettings,
    ServerSettings,
    Settings,
)
from vllm_server.config.sources import (
    Given,
    from_own_environment,
    from_seed_environment,
    from_yaml,
)
from vllm_server.config.values import convert

CONFIG_PATH_VARIABLE = "VLLM_CONFIG_PATH"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings and where each came from.

    Attributes:
        settings: The merged values, every one checked.
        origins: By path such as `engine.model`; a setting that is absent has its default.
        warnings: Sentences to log once logging works.
    """

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def load(
    flags: Sequence[Given] = (),
    environ: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> Configuration:
    """Merge flags, the environment, a YAML file and the defaults.

    Args:
        flags: What the command line gave.
        environ: The process's own environment by default.
        config: A YAML file; by default the one that `VLLM_CONFIG_PATH` names, if any.

    Raises:
        ConfigError: Something is unknown, contradictory or out of range; names the place.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(CONFIG_PATH_VARIABLE)
    config = config or (Path(named) if named else None)
    seed_values, warnings = from_seed_environment(environ)
    sources: list[Sequence[Given]] = [
        from_yaml(config) if config else [],
        seed_values,
        from_own_environment(environ),
        flags,
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source in sources:
        _merge(source, values, origins)
    return Configuration(_build(values), origins, tuple(warnings))


def _merge(source: Iterable[Given], values: dict[str, Any], origins: dict[str, str]) -> None:
    """Let one source win over the weaker ones before it."""
    here: dict[Field, tuple[Any, str]] = {}
    for given in source:
        value = _value(given)
        earlier = here.get(given.field)
        if earlier is not None and earlier[0] != value:
            _refuse_contradiction(given, earlier[1])
        here[given.field] = (value, given.origin)
    for field, (value, origin) in here.items():
        if field.adds and field.path in values:
            value = tuple(dict.fromkeys((*values[field.path], *value)))
            origin = f"{origins[field.path]} + {origin}"
        values[field.path] = value
        origins[field.path] = origin


def _value(given: Given) -> Any:
    try:
        return convert(given.field, given.raw)
    except ValueError as error:
        shown = "" if given.field.secret else f" is {given.raw!r}, but"
        raise ConfigError(sentence(f"{given.origin}{shown} {error}")) from None


def _refuse_contradiction(given: Given, earlier: str) -> None:
    raise ConfigError(
        f"{earlier} and {given.origin} are two names of the setting {given.field.path} with "
        "different values; keep one of them."
    )


_SECTIONS: dict[str, type[Any]] = {
    "server": ServerSettings,
    "engine": EngineSettings,
    "sampling": SamplingSettings,
    "auth": AuthSettings,
}


def _build(values: Mapping[str, Any]) -> Settings:
    parts = {
        section: cls(
            **{
                f.key: values[f.path]
                for f in all_fields()
                if f.section == section and f.path in values
            }
        )
        for section, cls in _SECTIONS.items()
    }
    return Settings(**parts)
