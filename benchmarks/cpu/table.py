"""Rounds of a comparison as medians, ratios and a Markdown table. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any, NamedTuple

from benchmarks.cpu.cases import CASES, Case

OURS = "vllm-lite"
Row = dict[str, Any]
_FIGURES = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
QUIET = 0.9  # of the best read rate that was ever recorded
BUSY = 0.2  # cores that others may use: engines that spin suffer most from them


class Cell(NamedTuple):
    """One figure of one engine in all rounds."""

    median: float
    spread: float  # largest less smallest, as a share of the median

    @classmethod
    def of(cls, values: Iterable[float]) -> Cell:
        """From the rounds."""
        found = list(values)
        middle = median(found)
        return cls(middle, (max(found) - min(found)) / middle)

    def __str__(self) -> str:
        return f"{number(self.median)} ±{self.spread / 2:.0%}"


def is_quiet(read: float, recorded: Iterable[float], busy: float) -> bool:
    """Whether a read rate is near the best of those recorded, and few cores were in use."""
    return busy < BUSY and read >= QUIET * max([read, *recorded])


def number(value: float) -> str:
    """Three figures at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(rows: list[Row], key: str) -> dict[tuple[str, str], Cell]:
    """By case and engine, where there is such a figure."""
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.get(key) is not None:
            values.setdefault((row["case"], row["engine"]), []).append(row[key])
    return {place: Cell.of(found) for place, found in values.items()}


def ratios(row: Mapping[str, Cell], goals: Mapping[str, float]) -> tuple[str, str]:
    """Ours over every peer, and whether the goals are reached; empty if there is nothing to say."""
    if OURS not in row:
        return "", ""
    against = {name: row[OURS].median / cell.median for name, cell in row.items() if name != OURS}
    shown = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in against.items())
    said = [
        f"{goal:g}x {name}: {'yes' if against[name] >= goal else 'no'}"
        for name, goal in goals.items()
        if name in against
    ]
    return shown, ", ".join(said)


def latest(lines: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Of a file of several runs, the rows of each case's newest, and what is said of these runs.

    Args:
        lines: What is said of each run, under `about`, and rows; both name their `run`.
    """
    runs: dict[str, Row] = {}
    rows: list[Row] = []
    for line in lines:
        if "about" in line:
            runs[line["about"]["run"]] = line["about"]
        else:
            rows.append(line)
    newest: dict[str, str] = {}
    for row in rows:
        newest[row["case"]] = max(row["run"], newest.get(row["case"], ""))
    kept = [row for row in rows if newest[row["case"]] == row["run"]]
    return kept, [about for name, about in sorted(runs.items()) if name in newest.values()]


def markdown(rows: list[Row], runs: list[Row]) -> str:
    """The whole document.

    Args:
        rows: At least one.
        runs: What is said of the runs they are from.
    """
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    versions = {row["engine"]: row["version"] for row in rows}
    named = ", ".join(f"{name} {versions[name]}" for name in engines)
    about = runs[-1]
    lines = [
        f"# {about['date']}, {about['machine']}",
        "",
        *dict.fromkeys(f"    {run['command']}" for run in runs),
        "",
        f"{named}. {about['threads']} threads for each. Tokens/s of the whole batch: medians of "
        f"the rounds and half their spread. {_ceilings(rows)}",
        "",
        *_rates(rows, engines),
        "",
        *_ready(rows, engines),
    ]
    return "\n".join(lines) + "\n"


def _ceilings(rows: list[Row]) -> str:
    read, products = (Cell.of(row[key] for row in rows) for key in ("read", "products"))
    said = (
        f"The limit is of the same minutes: {read.median / 1e9:.1f} GB/s read, "
        f"{products.median / 1e9:.0f} GFLOP/s in bf16 products."
    )
    loud = sum(not row["quiet"] for row in rows)
    if not loud:
        return said
    return f"{said} **Machine not quiet** in {loud} of {len(rows)} figures, whose cases have a (!)."


def _rates(rows: list[Row], engines: list[str]) -> Iterable[str]:
    head = ["case", "", *engines, "of the limit", "ratio", "goal"]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    found = {figure: cells(rows, key) for figure, key in _FIGURES.items()}
    limits = {figure: cells(rows, f"{figure}_of_limit") for figure in _FIGURES}
    loud = {row["case"] for row in rows if not row["quiet"]}
    order = [*CASES, *(row["case"] for row in rows)]
    for case in sorted({row["case"] for row in rows}, key=order.index):
        name = f"{case} (!)" if case in loud else case
        for figure in _FIGURES:
            row = {e: found[figure][case, e] for e in engines if (case, e) in found[figure]}
            if row:
                share = limits[figure].get((case, OURS))
                shown = f"{share.median:.0%}" if share else ""
                values = [str(row.get(engine, "")) for engine in engines]
                ends = ratios(row, _goals(CASES.get(case), figure))
                yield f"| {' | '.join([name, figure, *values, shown, *ends])} |"


def _goals(case: Case | None, figure: str) -> Mapping[str, float]:
    if case is None:
        return {}
    return case.goals if figure == "decode" else case.prefill_goals


def _ready(rows: list[Row], engines: list[str]) -> Iterable[str]:
    """From the start of the process, once per model; engines that map files read them late."""
    yield f"| seconds until | {' | '.join(['', *engines])} |"
    yield "|---" * (len(engines) + 2) + "|"
    renamed = [{**row, "case": row["model"]} for row in rows]
    for key, name in (("ready_s", "ready"), ("first_token_s", "the first token")):
        found = cells(renamed, key)
        for model in dict.fromkeys(row["model"] for row in rows):
            values = [str(found.get((model, engine), "")) for engine in engines]
            yield f"| {' | '.join([name, model, *values])} |"
