"""The rows of a GPU run as one Markdown document. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_INNER = ("run", "stage")
_SHARES = ("of ", "share")


def read(path: Path) -> tuple[list[Row], list[Row]]:
    """What is said of each run in a file, and its rows."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["about"] for line in lines if "about" in line], [
        line for line in lines if "about" not in line
    ]


def newest(runs: Sequence[Row], rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The runs that the last rows of each stage are from, and these rows."""
    last: dict[str, str] = {}
    for row in rows:
        last[row["stage"]] = max(row["run"], last.get(row["stage"], ""))
    kept = [row for row in rows if last[row["stage"]] == row["run"]]
    used = set(last.values())
    return [run for run in runs if run["run"] in used], kept


def markdown(runs: Sequence[Row], rows: Sequence[Row]) -> str:
    """The document of one device and day.

    Args:
        runs: At least one.
        rows: In the order in which they were measured.
    """
    first = runs[0]
    lines = [
        f"# {first['date']}, {first['device']}",
        "",
        f"torch {first['torch']}, Triton {first['triton']}, CUDA {first['cuda']}, driver "
        f"{first['driver']}.",
        "",
        *dict.fromkeys(f"    {run['command']}" for run in runs),
        "",
        "Shares are of what the same run measured as the device's ceilings, see its first table. "
        "Weights and inputs are random; outputs are as long as asked for.",
    ]
    for stage, group in groupby(rows, key=lambda row: row["stage"]):
        lines += ["", f"## {stage}", *_tables(list(group))]
    return "\n".join(lines) + "\n"


def _tables(rows: list[Row]) -> Iterator[str]:
    """A new table wherever the columns change; why a stage ended early is said below."""
    plain = [{k: v for k, v in row.items() if k not in _INNER} for row in rows]
    plain = [row for row in plain if list(row) != ["seconds"]]
    for head, group in groupby(plain, key=list):
        yield ""
        if head in (["cut"], ["failed"]):
            yield from (f"Not all of it: {next(iter(row.values()))}." for row in group)
            continue
        yield f"| {' | '.join(head)} |"
        yield "|---" * len(head) + "|"
        for row in group:
            yield f"| {' | '.join(cell(name, value) for name, value in row.items())} |"


def cell(name: str, value: object) -> str:
    """A value as it is shown; shares in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if name.startswith(_SHARES):
        return f"{value:.0%}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write(paths: Iterable[Path]) -> list[Path]:
    """The document of each device and day beside the lines of its commands.

    Args:
        paths: `<date>-<device>-<part>.jsonl`.
    """
    made: list[Path] = []
    stems = sorted(path.with_suffix("") for path in paths)
    for stem, parts in groupby(stems, key=lambda path: path.name.rpartition("-")[0]):
        runs: list[Row] = []
        rows: list[Row] = []
        for part in parts:
            folder = part.parent
            found = newest(*read(part.with_suffix(".jsonl")))
            runs, rows = runs + found[0], rows + found[1]
        if rows:
            made.append(folder / f"{stem}.md")
            made[-1].write_text(markdown(runs, rows))
    return made
