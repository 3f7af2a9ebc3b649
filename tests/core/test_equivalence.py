"""Every combination of features equals a plain loop, token for token, and leaves no block held."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from core_harness import SETTINGS, run

SEEDS = range(60)  # times 48 settings: 2,880 runs

ALWAYS = [
    "preemptions",
    "hits",
    "loaded blocks",
    "saved blocks",
    "mixed batches",
    "failed rows",
    "batch faults",
    "pauses",
    "runs with a weak digest",
    "pinned at the end",
    "abort waiting",
    "abort loading",
    "abort running",
    "abort preempted",
    "abort unknown or finished",
    "finished by stop",
    "finished by length",
    "finished by abort",
    "finished by error",
]


@pytest.mark.parametrize(
    ("overlap", "drafts"), [*product((False, True), ("none", "backend", "host"))]
)
def test_every_feature_combination_equals_the_reference(overlap: bool, drafts: str) -> None:
    taken: Counter[str] = Counter()
    for setting in SETTINGS:
        if (setting.overlap, setting.drafts) == (overlap, drafts):
            for seed in SEEDS:
                taken += run(seed, setting)
    expected = [*ALWAYS]
    if overlap:
        expected.append("abort in flight")
    if drafts != "none":
        expected.append("accepted drafts")
    missing = [path for path in expected if not taken[path]]
    assert not missing, f"paths that no run took: {missing}"
    assert taken["runs"] == 8 * len(SEEDS)
