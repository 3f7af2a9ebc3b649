"""Prints what is larger than reads well: files over 400 lines, functions over 50.

A report, not a gate: a long table of data is not code, and a function that is one idea may be long.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 400
MAX_FUNCTION = 50


def large_rooms(path: Path) -> Iterator[str]:
    """Lines of the report for one file."""
    source = path.read_text()
    if (lines := source.count("\n")) > MAX_FILE:
        yield f"{path}: {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{path}:{node.lineno} {node.name}: {length} lines"


if __name__ == "__main__":
    for path in sorted(Path("packages").rglob("src/**/*.py")):
        for row in large_rooms(path):
            print(row)
