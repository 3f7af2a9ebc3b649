"""From the words of a command line to checked settings, with logging switched on."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_server import logs
from vllm_server.config.check import check
from vllm_server.config.document import effective
from vllm_server.config.flags import FlagParser
from vllm_server.config.load import Configuration, load

log = logging.getLogger(__name__)


def read(
    parser: FlagParser, argv: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, Configuration]:
    """Parse, merge, check and set up logging; ends the process for `--print-config`.

    Args:
        parser: With the command's own flags.
        argv: Without the command's name.
        defaults: The command's defaults by path, weaker than every source.

    Raises:
        ConfigError: Something is wrong with a flag, a variable, the file or their combination.
    """
    parsed, given = parser.parse(argv)
    configuration = load(given, config=getattr(parsed, "config", None))
    configuration = check(_with_defaults(configuration, defaults or {}))
    if getattr(parsed, "print_config", False):
        print(effective(configuration, parser.use.paths))
        raise SystemExit(0)
    server = configuration.settings.server
    logs.setup(server.log_level, server.log_format)
    for warning in configuration.warnings:
        log.warning("%s", warning)
    return parsed, configuration


def _with_defaults(configuration: Configuration, defaults: Mapping[str, Any]) -> Configuration:
    settings = configuration.settings
    for path, value in defaults.items():
        section, key = path.split(".")
        if path not in configuration.origins:
            part = replace(getattr(settings, section), **{key: value})
            settings = replace(settings, **{section: part})
    return replace(configuration, settings=settings)
