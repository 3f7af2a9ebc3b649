"""Which GGUF files are meant: one, or every part of a split set; knows names, opens nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from vllm_traits import ModelError

SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)
_MAX_PARTS = 1000
_MAX_LISTED = 20


def is_gguf(name: str | Path) -> bool:
    """Whether a file is meant to be GGUF, by its name."""
    return str(name).lower().endswith(SUFFIX)


def model_name(path: Path) -> str:
    """What a file calls its model: its name without suffix and number."""
    part = _PART.fullmatch(path.name)
    return part[1] if part else path.name[: -len(SUFFIX)]


def parts_of(name: str) -> list[str]:
    """Every file of the set that `name` is a part of, in order; a file of its own is alone.

    Raises:
        ModelError: The number of parts cannot be.
    """
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    count = int(part[3])
    if not 1 <= int(part[2]) <= count <= _MAX_PARTS:
        raise ModelError(f"{name} cannot be a part of a set; at most {_MAX_PARTS} are read.")
    return [f"{part[1]}-{number:05}-of-{part[3]}{SUFFIX}" for number in range(1, count + 1)]


def choose_parts(names: Sequence[str], file: str, where: str) -> list[str]:
    """The files to take when `file` is wanted.

    Args:
        names: What is there.
        file: One file, or any part of a set.
        where: What has those files, for messages.

    Raises:
        ModelError: It is not there, or a part of it is not.
    """
    if file not in names:
        near = get_close_matches(file, [name for name in names if is_gguf(name)], 1, 0.0)
        hint = f" The nearest is {near[0]}." if near else ""
        raise ModelError(f"{where} has no file {file!r}.{hint} {listed(names)}")
    parts = parts_of(file)
    missing = sorted(set(parts) - set(names))
    if missing:
        raise ModelError(f"{where} lacks {', '.join(missing)}, which {file} needs.")
    return parts


def listed(names: Sequence[str]) -> str:
    """A sentence with the files that can be chosen; of a set the first one."""
    firsts = sorted({parts_of(name)[0] for name in names if is_gguf(name)})
    if not firsts:
        return "It has no GGUF files."
    more = f" and {len(firsts) - _MAX_LISTED} more" if len(firsts) > _MAX_LISTED else ""
    return f"Its GGUF files: {', '.join(firsts[:_MAX_LISTED])}{more}."
