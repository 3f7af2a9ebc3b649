"""`vllm-lite bench serve | throughput | latency`."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_traits import ConfigError

from vllm_server.bench.workload import Workload
from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser
from vllm_server.config.names import nearest

_USAGE = """\
usage: vllm-lite bench serve|throughput|latency [flags]

  serve       Load any OpenAI-compatible server and measure what its clients see.
  throughput  All prompts at once, straight through the engine.
  latency     One batch after the other, straight through the engine.

Add --help for the flags of each."""


def run(argv: Sequence[str]) -> int:
    """Run one of the three; the exit code is 1 if every request failed."""
    kinds = {"serve": _serve, "throughput": _offline, "latency": _offline}
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv[0] not in kinds:
        raise ConfigError(f"Unknown benchmark {argv[0]!r}{nearest(argv[0], kinds)}.")
    return kinds[argv[0]](argv[0], argv[1:])


def _serve(kind: str, argv: Sequence[str]) -> int:
    parser = FlagParser(
        "vllm-lite bench serve", "Load an OpenAI-compatible server.", settings=False
    )
    _add_workload(parser, num_prompts=100)
    _add_load(parser)
    parsed, _ = parser.parse(argv)
    from vllm_server.bench.serve import run as run_load

    report = asyncio.run(run_load(_load(parsed)))
    _show(report.as_table(), report.as_json(), parsed.output_json)
    return 0 if report.completed else 1


def _add_workload(parser: FlagParser, num_prompts: int) -> None:
    group = parser.add_argument_group("workload")
    add = group.add_argument
    add(
        "--num-prompts",
        type=int,
        default=num_prompts,
        metavar="N",
        help="Requests in all (%(default)s).",
    )
    add(
        "--dataset",
        default="random",
        metavar="NAME",
        help="random, fixed, or a JSON Lines file with prompt and output_len (%(default)s).",
    )
    add(
        "--input-len",
        type=int,
        default=128,
        metavar="N",
        help="Tokens per random prompt (%(default)s).",
    )
    add("--output-len", type=int, default=64, metavar="N", help="Tokens to generate (%(default)s).")
    add(
        "--spread",
        type=float,
        default=0.0,
        metavar="X",
        help="Lengths vary down to this share less, 0 to 1 (%(default)s).",
    )
    add(
        "--bench-seed",
        type=int,
        default=0,
        metavar="N",
        help="Seed of prompts and arrivals (%(default)s).",
    )
    add(
        "--output-json",
        type=Path,
        default=None,
        metavar="FILE",
        help="Write all figures to this file.",
    )


def _add_load(parser: FlagParser) -> None:
    add = parser.add_argument_group("load").add_argument
    add(
        "--url",
        "--base-url",
        dest="url",
        default="http://127.0.0.1:8000",
        help="The server (%(default)s).",
    )
    add(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="What to call (%(default)s).",
    )
    add("--model", "-m", default=None, help="Model to ask for; the server's first by default.")
    add("--api-key", default=None, metavar="KEY", help="Sent as a bearer token.")
    add(
        "--request-rate",
        type=float,
        default=float("inf"),
        metavar="R",
        help="Poisson arrivals per second; inf is all at once (%(default)s).",
    )
    add(
        "--max-concurrency",
        type=int,
        default=None,
        metavar="N",
        help="Requests in flight at most: a closed loop.",
    )
    add(
        "--num-warmups",
        type=int,
        default=1,
        metavar="N",
        help="Requests before the clock starts (%(default)s).",
    )
    add("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (%(default)s).")
    add(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="Seconds per request (%(default)s).",
    )
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="GOAL",
        help="Limits in ms, such as ttft:200 tpot:50 e2e:5000.",
    )
    parser.add_switch(
        "--ignore-eos",
        default=True,
        help="Ask for exactly the output length; not known to OpenAI itself.",
    )


def _load(parsed: argparse.Namespace) -> Any:
    from vllm_server.bench.report import parse_goals
    from vllm_server.bench.serve import ServeLoad

    for name in ("request_rate", "max_concurrency", "timeout"):
        value = getattr(parsed, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be positive.")
    try:
        goals = parse_goals(parsed.goodput)
    except ValueError as error:
        raise ConfigError(f"--goodput: {error}.") from None
    return ServeLoad(
        url=parsed.url,
        workload=_workload(parsed, as_ids=parsed.endpoint == "completions"),
        endpoint=parsed.endpoint,
        model=parsed.model,
        api_key=parsed.api_key,
        request_rate=parsed.request_rate,
        max_concurrency=parsed.max_concurrency,
        num_warmups=parsed.num_warmups,
        temperature=parsed.temperature,
        ignore_eos=parsed.ignore_eos,
        timeout=parsed.timeout,
        goals=tuple(goals.items()),
    )


def _workload(parsed: argparse.Namespace, as_ids: bool) -> Workload:
    for name in ("num_prompts", "input_len", "output_len"):
        if getattr(parsed, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    if not 0 <= parsed.spread <= 1:
        raise ConfigError(f"--spread is {parsed.spread}, but must be between 0 and 1.")
    return Workload(
        num_prompts=parsed.num_prompts,
        dataset=parsed.dataset,
        input_len=parsed.input_len,
        output_len=parsed.output_len,
        spread=parsed.spread,
        as_ids=as_ids,
        seed=parsed.bench_seed,
    )


def _offline(kind: str, argv: Sequence[str]) -> int:
    parser = FlagParser(f"vllm-lite bench {kind}", "Measure the engine without HTTP.")
    _add_workload(parser, num_prompts=100 if kind == "throughput" else 1)
    if kind == "latency":
        parser.add_argument(
            "--num-iters",
            type=int,
            default=10,
            metavar="N",
            help="Batches to measure (%(default)s).",
        )
    parsed, configuration = settings.read(parser, argv)
    offline = import_module("vllm_server.bench.offline")
    workload = _workload(parsed, as_ids=True)
    if kind == "throughput":
        report = offline.throughput(configuration.settings, workload)
    else:
        report = offline.latency(configuration.settings, workload, parsed.num_iters)
    _show(report.as_table(), report.as_json(), parsed.output_json)
    return 0


def _show(table: str, figures: Mapping[str, Any], file: Path | None) -> None:
    print(table)
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
