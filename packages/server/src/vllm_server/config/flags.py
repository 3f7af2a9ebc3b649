"""Command-line flags generated from the settings, and a parser whose errors are `ConfigError`.

Flags may be written with dashes or underscores, `--x v` or `--x=v`, `--x` or `--no-x`. Which
settings a command takes is said in `uses`; a command adds its own flags to its parser.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm_traits import ConfigError

from vllm_server.config.fields import Field, all_fields
from vllm_server.config.names import nearest, sentence
from vllm_server.config.sources import Given, refuse
from vllm_server.config.unavailable import UNAVAILABLE, Unavailable
from vllm_server.config.uses import USES, Use, unused, unused_in
from vllm_server.config.values import limits

_SHORTHANDS = (
    ("--cpu", "engine.device", "cpu", "Same as --device cpu."),
    (
        "--disable-shutdown-endpoint",
        "server.shutdown_endpoint",
        "false",
        "Same as --no-shutdown-endpoint.",
    ),
)
_METAVARS = {"int": "N", "float": "X", "text": "TEXT", "texts": "TEXT", "keys": "KEY"}


class FlagParser(argparse.ArgumentParser):
    """Parses a command's own flags and those of the settings it uses; refuses the others'.

    Args:
        command: One of `USES`.
        description: One sentence for `--help`.
    """

    def __init__(self, command: str, description: str) -> None:
        prog = f"vllm-lite {command}"
        super().__init__(
            prog=prog,
            usage=f"{prog} [flags]",
            description=description,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=_HelpFormatter,
        )
        self.use: Use = USES[command]
        self._switches: set[str] = set()
        if self.use.paths:
            self._add_settings()

    def parse(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[Given]]:
        """The command's own values, and what the settings were given.

        Raises:
            ConfigError: A flag is unknown or unused, lacks its value, or asks for what is not
                there.
        """
        self._refuse_unused()
        start = argparse.Namespace(given=[])
        parsed, rest = self.parse_known_args(self._normalised(argv), start)
        for word in rest:
            if not word.startswith("-"):
                raise ConfigError(f"Unexpected argument {word!r}; see --help.")
            hint = nearest(word.partition("=")[0], self._taken())
            raise ConfigError(sentence(f"Unknown flag {word}{hint}"))
        self._check_modes(parsed)
        return parsed, _joined(parsed.given)

    def error(self, message: str) -> NoReturn:
        """Called by argparse; the command line's top level prints it and exits with 2."""
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")

    def add_switch(self, *flags: str, **rest: Any) -> None:
        """A boolean flag of the command's own, with its `--no-` form."""
        action = self.add_argument(*flags, action=argparse.BooleanOptionalAction, **rest)
        self._switches.update(action.option_strings)

    def _normalised(self, argv: Sequence[str]) -> list[str]:
        """Dashes for underscores in names, and `--x=true|false` as `--x` or `--no-x`."""
        words: list[str] = []
        for i, word in enumerate(argv):
            if word == "--":
                return [*words, *argv[i:]]
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if equals and name in self._switches and value.lower() in ("true", "false"):
                off = value.lower() == "false"
                words.append(f"--no-{name[2:]}" if off else name)
            else:
                words.append(name + equals + value)
        return words

    def _add_settings(self) -> None:
        self.add_argument(
            "--config", "-c", type=Path, metavar="FILE", help="YAML file with settings."
        )
        self.add_argument(
            "--print-config",
            action="store_true",
            help="Print each setting the command uses and where its value comes from, then exit.",
        )
        groups: dict[str, Any] = {}
        for field in self.use.fields:
            if field.section not in groups:
                groups[field.section] = self.add_argument_group(f"{field.section} settings")
            self._add_setting(groups[field.section], field)
        by_path = {field.path: field for field in self.use.fields}
        for flag, path, value, words in _SHORTHANDS:
            if path in by_path:
                groups[path.partition(".")[0]].add_argument(
                    flag, action=_Collect, nargs=0, value=value, field=by_path[path], help=words
                )
        for entry in UNAVAILABLE:
            self._add_refusal(entry)

    def _add_setting(self, group: Any, field: Field) -> None:
        shown, hidden = _spellings(field)
        rest: dict[str, Any] = {"action": _Collect, "field": field}
        if field.kind == "bool":
            rest["nargs"] = 0
            self._switches.update(shown, hidden)
        else:
            rest["metavar"] = (
                "{" + ",".join(field.choices) + "}" if field.choices else _METAVARS[field.kind]
            )
        group.add_argument(*shown, help=_help(field).replace("%", "%%"), **rest)
        if hidden:
            group.add_argument(*hidden, help=argparse.SUPPRESS, **rest)

    def _add_refusal(self, entry: Unavailable) -> None:
        flags = _with_negation(entry.flags) if entry.switch else entry.flags
        if entry.switch:
            self._switches.update(flags)
        nargs = 0 if entry.switch else None
        self.add_argument(*flags, action=_Refuse, nargs=nargs, entry=entry, help=argparse.SUPPRESS)

    def _refuse_unused(self) -> None:
        """Every flag of a setting that is free is one of another command: say so."""
        for field in all_fields():
            shown, hidden = _spellings(field)
            shorthands = [flag for flag, path, *_ in _SHORTHANDS if path == field.path]
            flags = [*shown, *hidden, *shorthands]
            if free := [flag for flag in flags if flag not in self._option_string_actions]:
                self.add_argument(
                    *free, action=_Unused, field=field, nargs="?", help=argparse.SUPPRESS
                )

    def _taken(self) -> list[str]:
        actions = self._option_string_actions.items()
        return [flag for flag, action in actions if not isinstance(action, _Unused | _Refuse)]

    def _check_modes(self, parsed: argparse.Namespace) -> None:
        for mode in self.use.modes:
            given: list[Given] = parsed.given if mode.holds(parsed) else []
            for item in given:
                if item.field.path in mode.unused:
                    raise ConfigError(unused_in(self.use, mode, item.field, item.origin))


class _Collect(argparse.Action):
    """Notes a setting's value under the spelling that was used."""

    def __init__(self, *, field: Field, value: str | None = None, **rest: Any) -> None:
        own: dict[str, Any] = {**rest, "dest": "given"}
        super().__init__(**own)
        self._field = field
        self._value = value

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        raw = values
        if self.nargs == 0:
            raw = self._value or ("false" if option_string.startswith("--no-") else "true")
        namespace.given.append(Given(self._field, raw, f"flag {option_string}"))


class _Refuse(argparse.Action):
    """Ends with a sentence unless the value asks for nothing."""

    def __init__(self, *, entry: Unavailable, **rest: Any) -> None:
        own: dict[str, Any] = {**rest, "dest": "given"}
        super().__init__(**own)
        self._entry = entry

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        raw = values
        if self.nargs == 0:
            raw = "false" if option_string.startswith("--no-") else "true"
        refuse(self._entry, raw, f"flag {option_string}")


class _Unused(argparse.Action):
    """Ends with a sentence: the command has no use for the setting."""

    def __init__(self, *, field: Field, **rest: Any) -> None:
        own: dict[str, Any] = {**rest, "dest": "given"}
        super().__init__(**own)
        self._field = field

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        raise ConfigError(unused(parser.use, self._field, f"flag {option_string}"))


class _HelpFormatter(argparse.HelpFormatter):
    """Room for long flag names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def _spellings(field: Field) -> tuple[list[str], list[str]]:
    """Flags to show and flags that merely work: the key itself, where it is not the first name."""
    canonical = "--" + field.key.replace("_", "-")
    hidden = [canonical] if canonical != field.flags[0] else []
    shown = [flag for flag in field.flags if flag not in hidden]
    if field.kind != "bool":
        return shown, hidden
    return _with_negation(shown[:1]), _with_negation([*shown[1:], *hidden])


def _with_negation(flags: Sequence[str]) -> list[str]:
    return [name for flag in flags for name in (flag, f"--no-{flag[2:]}")]


def _help(field: Field) -> str:
    notes = [limits(field)] if limits(field) else []
    if field.default not in (None, (), ""):
        default = str(field.default).lower() if field.kind == "bool" else str(field.default)
        notes.append(f"default {default}")
    return field.help + (f" ({'; '.join(notes)})" if notes else "")


def _joined(given: Sequence[Given]) -> list[Given]:
    """Repeated flags: a list grows, anything else takes the last value of the same spelling."""
    joined: dict[tuple[str, str], Given] = {}
    for item in given:
        spelling = "" if item.field.is_list else item.origin.replace("--no-", "--")
        earlier = joined.get((item.field.path, spelling))
        if earlier is not None and item.field.is_list:
            item = item._replace(raw=f"{earlier.raw},{item.raw}")
        joined[item.field.path, spelling] = item
    return list(joined.values())
