"""Reads a YAML configuration file into entries that remember their line and column.

Knows the two-level shape `section: {key: value}`, not which sections and keys exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from vllm_traits import ConfigError


class Entry(NamedTuple):
    """One key of the file; a section without keys is an entry without a key.

    Attributes:
        section: Name of the section.
        key: Name in the section.
        value: What YAML makes of it.
        place: `file:line:column`.
    """

    section: str
    key: str
    value: Any
    place: str


def read_entries(path: Path) -> list[Entry]:
    """Every key of every section, in the file's order.

    Raises:
        ConfigError: The file cannot be read, is no YAML, or has another shape; with its place.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"Cannot read the configuration file {path}: {reason}.") from None
    try:
        return list(_entries(yaml.SafeLoader(text), path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        raise ConfigError(f"{_place(path, mark)}: not valid YAML: {problem}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}.") from None


def _entries(loader: yaml.SafeLoader, path: Path) -> Iterator[Entry]:
    root = loader.get_single_node()
    for section, section_node in _pairs(root, path, "The file"):
        for key, node in _pairs(section_node, path, f"Section {section.value!r}"):
            value: Any = loader.construct_document(node)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            yield Entry(section.value, key.value, value, _place(path, key.start_mark))


def _pairs(
    node: yaml.Node | None, path: Path, what: str
) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    """Keys and values of a mapping; an empty one may be absent or null."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    place = _place(path, node.start_mark)
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place}: {what} must be a mapping of keys to values.")
    seen: set[str] = set()
    pairs: list[tuple[yaml.ScalarNode, yaml.Node]] = []
    for key, value in node.value:
        at = _place(path, key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{at}: a key must be a word.")
        if key.value in seen:
            raise ConfigError(f"{at}: {key.value!r} appears twice.")
        seen.add(key.value)
        pairs.append((key, value))
    return pairs


def _place(path: Path, mark: Any) -> str:
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
