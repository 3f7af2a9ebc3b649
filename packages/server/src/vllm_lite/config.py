"""What an engine in this process is made of: the `engine` settings as a class."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vllm_server.config import EngineSettings, SamplingSettings, Settings
from vllm_server.config.check import check
from vllm_server.config.fields import all_fields
from vllm_server.config.load import Configuration
from vllm_server.config.unavailable import UNAVAILABLE
from vllm_server.config.values import convert
from vllm_traits import ConfigError

from vllm_lite.names import refuse_unknown

_ABSENT = {
    key.removeprefix("engine."): entry.message
    for entry in UNAVAILABLE
    for key in entry.keys
    if key.startswith("engine.")
}


@dataclass(frozen=True)
class EngineConfig(EngineSettings):
    """The settings of section `engine`, all optional; without a model, the embedded one is used.

    Attributes:
        model_id: Another name of `model`: a Hub id.
        model_path: Another name of `weight_path`: a folder with weights.
        weight_file: Another name of `gguf_file`.
        seed: Seed of requests that name none.
    """

    model_id: str | None = None
    model_path: str | None = None
    weight_file: str | None = None
    seed: int | None = None

    def __new__(cls, *args: object, **given: object) -> EngineConfig:
        """Refuse fields that do not exist."""
        refuse_unknown(cls, given, (f.name for f in dataclasses.fields(cls)), _ABSENT)
        return super().__new__(cls)

    def settings(self, dtype: str) -> Settings:
        """The checked settings.

        Args:
            dtype: Wins over the field of that name unless it is `auto`.

        Raises:
            ConfigError: A value has the wrong type or is out of range, or two names of one field
                differ.
        """
        values = {f.key: _checked(f.key, getattr(self, f.key)) for f in _engine_fields()}
        values["model"] = _one_of("model", self.model, "model_id", self.model_id, "builtin")
        values["weight_path"] = _one_of(
            "weight_path", self.weight_path, "model_path", self.model_path, None
        )
        values["gguf_file"] = _one_of(
            "gguf_file", self.gguf_file, "weight_file", self.weight_file, None
        )
        if dtype != "auto":
            values["dtype"] = _checked("dtype", dtype)
        settings = Settings(
            engine=EngineSettings(**values), sampling=SamplingSettings(seed=self.seed)
        )
        return check(Configuration(settings, {})).settings


def _engine_fields() -> list[Any]:
    return [f for f in all_fields() if f.section == "engine"]


def _checked(key: str, value: object) -> Any:
    (field,) = (f for f in _engine_fields() if f.key == key)
    try:
        return convert(field, value)
    except ValueError as error:
        raise ConfigError(f"EngineConfig.{key} is {value!r}, but {error}.") from None


def _one_of(name: str, value: Any, alias: str, other: Any, default: Any) -> Any:
    if other is not None and value not in (default, other):
        raise ConfigError(f"{name} is {value!r} and {alias} is {other!r}; give one of them.")
    return value if other is None else other
