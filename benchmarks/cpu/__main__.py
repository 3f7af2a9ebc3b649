"""`python -m benchmarks.cpu` with `ceilings`, `kernels`, `attention`, `determinism`, `compare` or
`profile`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_models.threads import wait_briefly

if {"profile", "determinism"} & set(sys.argv):  # as the server does before torch is imported
    wait_briefly()

import torch
from vllm_models.native.library import Library, library

from benchmarks.cpu import attention, ceilings, compare, determinism, kernels, profile
from benchmarks.cpu.rows import report

_CACHE = Path.home() / ".cache" / "vllm-lite-benchmarks"


def arguments() -> argparse.ArgumentParser:
    """One command for each measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, default=torch.get_num_threads())
    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument("--json", type=Path, help="append the figures to this file")
    commands.add_parser("ceilings", parents=[shared, rows], help=ceilings.__doc__)
    one = commands.add_parser("kernels", parents=[shared, rows], help="the linear kernels")
    one.add_argument("--kinds", nargs="+", default=["bf16", "Q8_0", "Q4_K", "Q6_K", "Q4_0"])
    one.add_argument("--rows", nargs="+", type=int, default=list(kernels.ROWS))
    paged = commands.add_parser("attention", parents=[shared, rows], help="decode attention")
    paged.add_argument("--cases", nargs="+", default=list(attention.CASES))
    paged.add_argument("--kinds", nargs="+", default=list(attention.KINDS))
    peers = commands.add_parser("compare", parents=[shared], help="ours and the peers in turn")
    peers.add_argument("--cases", default="all", help="names or patterns, with commas between")
    peers.add_argument("--rounds", type=int, default=3)
    peers.add_argument("--engines", help="names with commas between; all that are installed")
    peers.add_argument("--peers", type=Path, default=compare.ROOT / ".peers")
    peers.add_argument("--cache", type=Path, default=_CACHE, help="where checkpoints are kept")
    peers.add_argument("--results", type=Path, default=compare.RESULTS)
    step = commands.add_parser("profile", parents=[shared], help="where a decode step goes")
    step.add_argument("model", nargs="?", default="builtin")
    step.add_argument("--batch", type=int, default=1)
    step.add_argument("--context", type=int, default=128)
    step.add_argument("--steps", type=int, default=64)
    step.add_argument("--isq", help="quantize plain weights while loading")
    order = commands.add_parser(
        "determinism", parents=[shared, rows], help="what a fixed order of sums costs"
    )
    order.add_argument("--rows", nargs="+", type=int, default=list(determinism.ROWS))
    return parser


def main() -> None:
    """Measure what was asked for."""
    parser = arguments()
    given = parser.parse_args()
    if given.what == "compare":
        try:
            compare.main(given)
        except ValueError as error:
            parser.error(str(error))
        return
    built = library()
    if built is None:
        parser.error("there are no native kernels on this machine")
    torch.set_num_threads(given.threads)
    measure(given, built)


def measure(given: argparse.Namespace, built: Library) -> None:
    """What is measured in this process."""
    if given.what == "ceilings":
        report(ceilings.figures(built), given.json)
    elif given.what == "kernels":
        report(kernels.figures(built, given.kinds, given.rows), given.json)
    elif given.what == "attention":
        report(attention.figures(built, given.cases, given.kinds), given.json)
    elif given.what == "determinism":
        report(determinism.figures(built, given.rows), given.json)
    else:
        profile.main(given, built)


if __name__ == "__main__":
    main()
