"""The settings as a flat catalogue: every name, type and limit that `schema` declares.

Knows nothing about where values come from, and holds none.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from vllm_server.config.schema import Settings

Kind = Literal["bool", "int", "float", "text", "texts", "keys"]


@dataclass(frozen=True, slots=True)
class Field:
    """One setting.

    Attributes:
        section: `server`, `engine`, `sampling` or `auth`.
        key: Its name in the section and as an attribute.
        kind: How text becomes a value; `texts` and `keys` are lists.
        optional: Whether null is a value.
        default: Value where no source gives one.
        help: One line.
        flags: Spellings of the flag, the one to show first.
        seed_env: Well-known environment variables, weaker than our own.
        low: Smallest allowed number.
        high: Largest allowed number.
        choices: Allowed words or numbers, as text.
        secret: Never printed.
    """

    section: str
    key: str
    kind: Kind
    optional: bool
    default: Any
    help: str
    flags: tuple[str, ...]
    seed_env: tuple[str, ...]
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    secret: bool

    @property
    def path(self) -> str:
        """The setting's name in messages and in YAML, such as `engine.model`."""
        return f"{self.section}.{self.key}"

    @property
    def names(self) -> tuple[str, ...]:
        """The key, then its aliases: every long flag is also a YAML key."""
        aliases = (f.removeprefix("--").replace("-", "_") for f in self.flags if f[:2] == "--")
        return tuple(dict.fromkeys((self.key, *(a for a in aliases if len(a) > 1))))

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables of our own prefix."""
        return tuple(f"VLLM_LITE_{self.section}_{name}".upper() for name in self.names)

    @property
    def adds(self) -> bool:
        """Whether the values of all sources count together, as those of keys do."""
        return self.kind == "keys"

    @property
    def is_list(self) -> bool:
        """Whether the setting holds several values."""
        return self.kind in ("texts", "keys")


@cache
def all_fields() -> tuple[Field, ...]:
    """Every setting, in the order of the schema."""
    sections = typing.get_type_hints(Settings)
    return tuple(
        _field(section, declared, typing.get_type_hints(cls)[declared.name])
        for section, cls in sections.items()
        for declared in dataclasses.fields(cls)
    )


def _field(section: str, declared: dataclasses.Field[Any], hint: Any) -> Field:
    kind, optional = _kind(hint)
    given = declared.metadata
    flag = "--" + declared.name.replace("_", "-")
    flags = tuple(dict.fromkeys((*given["flags"], flag)))
    return Field(
        section=section,
        key=declared.name,
        kind=kind,
        optional=optional,
        default=declared.default,
        help=given["help"],
        flags=flags,
        seed_env=given["env"],
        low=given["low"],
        high=given["high"],
        choices=given["choices"],
        secret=given["secret"],
    )


_KINDS: dict[Any, Kind] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "text",
    tuple[str, ...]: "texts",
    tuple[Any, ...]: "keys",
}


def _kind(hint: Any) -> tuple[Kind, bool]:
    """`int | None` is an optional int; a type outside the table is a mistake in the schema."""
    if isinstance(hint, types.UnionType):
        (inner,) = (a for a in typing.get_args(hint) if a is not type(None))
        return _KINDS[inner], True
    return _KINDS[hint], False
