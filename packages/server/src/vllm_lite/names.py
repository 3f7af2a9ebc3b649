"""Refuses fields that do not exist, with the one that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_server.config.names import nearest


def refuse_unknown(
    cls: type, given: Iterable[str], known: Iterable[str], absent: Mapping[str, str] | None = None
) -> None:
    """Raise for the first given name that is not known.

    Args:
        cls: The class somebody constructs, for the message.
        given: Names of the fields that were given.
        known: Names of the fields it has.
        absent: Names of features that are not there, with the sentence that says so.

    Raises:
        TypeError: A name is not known.
    """
    fields = list(known)
    for name in given:
        if name in (absent or {}):
            raise TypeError(f"{cls.__name__}({name}=...): {(absent or {})[name]}")
        if name not in fields:
            raise TypeError(f"{cls.__name__} has no field {name!r}{nearest(name, fields)}")
