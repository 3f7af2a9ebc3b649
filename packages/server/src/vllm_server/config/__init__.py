"""Configuration: one schema, four sources, precedence flags > environment > YAML > defaults."""

from vllm_server.config.load import Configuration, load
from vllm_server.config.schema import (
    AuthSettings,
    EngineSettings,
    SamplingSettings,
    ServerSettings,
    Settings,
)

__all__ = [
    "AuthSettings",
    "Configuration",
    "EngineSettings",
    "SamplingSettings",
    "ServerSettings",
    "Settings",
    "load",
]
