"""`vllm-lite bench serve | throughput | latency`."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from vllm_traits import ConfigError

from vllm_server.bench.workload import Workload
from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser
from vllm_server.config.names import nearest, sentence

_USAGE = """\
usage: vllm-lite bench serve|throughput|latency [flags]

  serve       Load any OpenAI-compatible server and measure what its clients see.
  throughput  All prompts at once, straight through the engine.
  latency     One batch after the other, straight through the engine.

Add --help for the flags of each."""


class Option(NamedTuple):
    """A flag with one value.

    Attributes:
        flags: Its spellings; the first one names the value.
        kind: Makes the value of text.
        default: None is no value.
        metavar: Stands for the value in the help.
        help: What it means, without a full stop.
    """

    flags: str
    kind: Callable[[str], Any]
    default: Any
    metavar: str
    help: str


def run(argv: Sequence[str]) -> int:
    """Run one of the three; the exit code is 1 if every request failed."""
    kinds = {"serve": _serve, "throughput": _offline, "latency": _offline}
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv[0] not in kinds:
        raise ConfigError(sentence(f"Unknown benchmark {argv[0]!r}{nearest(argv[0], kinds)}"))
    return kinds[argv[0]](argv[0], argv[1:])


def _serve(kind: str, argv: Sequence[str]) -> int:
    parser = FlagParser("bench serve", "Load an OpenAI-compatible server.")
    _add_workload(parser, 100, "--bench-seed --seed")
    _add_load(parser)
    parsed, _ = parser.parse(argv)
    from vllm_server.bench.serve import run as run_load

    report = asyncio.run(run_load(_load(parsed)))
    _show(report.as_table(), report.as_json(), parsed.output_json)
    return 0 if report.completed else 1


def _add_workload(parser: FlagParser, num_prompts: int, seed_flags: str) -> None:
    options = (
        Option("--num-prompts", int, num_prompts, "N", "Requests in all"),
        Option("--dataset", str, "random", "NAME", "random, fixed or a JSON Lines file of prompts"),
        Option("--input-len", int, 128, "N", "Tokens per random prompt"),
        Option("--output-len", int, 64, "N", "Tokens to generate"),
        Option("--spread", float, 0.0, "X", "Lengths vary down to this share less, 0 to 1"),
        Option(seed_flags, int, 0, "N", "Seed of prompts and arrivals"),
        Option("--output-json", Path, None, "FILE", "Write all figures to this file"),
    )
    _add(parser, "workload", options)


def _add_load(parser: FlagParser) -> None:
    unlimited = float("inf")
    options = (
        Option("--url --base-url", str, "http://127.0.0.1:8000", "URL", "The server"),
        Option("--endpoint", str, "completions", "NAME", "What to call: completions or chat"),
        Option("--model -m", str, None, "NAME", "Model to ask for; the first of the server"),
        Option("--api-key", str, None, "KEY", "Sent as a bearer token"),
        Option("--request-rate", float, unlimited, "R", "Poisson arrivals per second; all at once"),
        Option("--max-concurrency", int, None, "N", "Requests in flight at most: a closed loop"),
        Option("--num-warmups", int, 1, "N", "Requests before the clock starts"),
        Option("--temperature", float, 0.0, "X", "0 is greedy"),
        Option("--timeout", float, 600.0, "S", "Seconds per request"),
    )
    _add(parser, "load", options)
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="GOAL",
        help="Limits in ms that a good request keeps: ttft:200 tpot:50 e2e:5000.",
    )
    parser.add_switch(
        "--ignore-eos",
        default=True,
        help="Ask for exactly the output length; OpenAI itself does not know this.",
    )


def _add(parser: FlagParser, title: str, options: Sequence[Option]) -> None:
    group = parser.add_argument_group(title)
    for option in options:
        shown = "" if option.default is None else f" ({option.default})"
        group.add_argument(
            *option.flags.split(),
            type=option.kind,
            default=option.default,
            metavar=option.metavar,
            help=f"{option.help}{shown}.",
        )


def _load(parsed: argparse.Namespace) -> Any:
    from vllm_server.bench.report import parse_goals
    from vllm_server.bench.serve import ENDPOINTS, ServeLoad

    for name in ("request_rate", "max_concurrency", "timeout"):
        value = getattr(parsed, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be positive.")
    if parsed.endpoint not in ENDPOINTS:
        raise ConfigError(f"--endpoint must be one of {', '.join(ENDPOINTS)}.")
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
    parser = FlagParser(f"bench {kind}", "Measure the engine without HTTP.")
    _add_workload(parser, 100 if kind == "throughput" else 1, "--bench-seed")
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
