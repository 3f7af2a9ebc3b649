"""`vllm-lite completion`: answer prompts, several at a time, and show the speed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_traits import ConfigError

from vllm_server.cli import settings
from vllm_server.config import Settings
from vllm_server.config.flags import FlagParser

if TYPE_CHECKING:
    from vllm_server.local import LocalEngine, TextStream

DEFAULT_PROMPT = "How are you today?"


def run(argv: Sequence[str]) -> int:
    """The exit code is 1 if an answer failed."""
    parser = FlagParser("completion", "Answer prompts and show the speed.")
    parser.add_argument(
        "--prompts", default=DEFAULT_PROMPT, metavar="TEXT", help='Prompts, split at "|".'
    )
    parser.add_argument(
        "--batch", type=int, default=None, metavar="N", help="The first prompt N times, muted."
    )
    parser.add_switch("--raw", default=False, help="Use no chat template.")
    parsed, configuration = settings.read(parser, argv, {"server.log_level": "warn"})
    prompts = split(parsed.prompts)
    chosen = configuration.settings
    if parsed.batch is not None:
        prompts, chosen = _batch(prompts, parsed.batch, chosen)

    from vllm_server.cli.session import open_engine
    from vllm_server.local import read_all
    from vllm_server.summary import summary

    with open_engine(chosen) as engine:
        streams = _submit(engine, prompts, parsed.raw, chosen.engine.max_tokens)
        if len(streams) == 1:
            _print_live(streams[0], muted=parsed.batch is not None)
        else:
            texts = read_all(streams)
            if parsed.batch is None:
                for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
                    print(f"[{number}] {prompt}\n{text}\n")
    accounts = [stream.account for stream in streams]
    print(summary(accounts))
    failed = [account.error for account in accounts if account.error]
    if failed:
        print(f"vllm-lite: error: {len(failed)} answers failed: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


def split(text: str) -> list[str]:
    """The prompts in `a | b`.

    Raises:
        ConfigError: There is none.
    """
    prompts = [part.strip() for part in text.split("|") if part.strip()]
    if not prompts:
        raise ConfigError("--prompts has no text.")
    return prompts


def _batch(prompts: list[str], num: int, chosen: Settings) -> tuple[list[str], Settings]:
    """The first prompt `num` times, all of them running at once."""
    if num < 1:
        raise ConfigError(f"--batch is {num}, but must be at least 1.")
    engine = replace(chosen.engine, max_num_seqs=num)
    return prompts[:1] * num, replace(chosen, engine=engine)


def _submit(
    engine: LocalEngine, prompts: Sequence[str], raw: bool, max_tokens: int | None
) -> list[TextStream]:
    """Start all of them, after all of them were checked."""
    from vllm_server.local import sampling_params

    if not raw:
        template = engine.tokenizer.apply_chat_template
        prompts = [template([{"role": "user", "content": prompt}]) for prompt in prompts]
    all_ids = [engine.encode(prompt) for prompt in prompts]
    for token_ids in all_ids:
        engine.check(token_ids)
    rooms = [engine.max_model_len - len(token_ids) for token_ids in all_ids]
    params = [sampling_params(engine.defaults, room, max_tokens) for room in rooms]
    return [engine.submit(*each) for each in zip(all_ids, params, strict=True)]


def _print_live(stream: TextStream, muted: bool) -> None:
    """Read one answer to its end, on the screen unless it is a benchmark."""
    for piece in stream:
        if not muted:
            print(piece.text, end="", flush=True)
    if not muted:
        print("\n")
