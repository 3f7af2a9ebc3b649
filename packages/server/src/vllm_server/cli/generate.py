"""`vllm-lite generate`: continue one prompt and print the text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_traits import ConfigError

from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser

MAX_TOKENS = 64


def run(argv: Sequence[str]) -> int:
    """The exit code is 0 unless the engine failed."""
    parser = FlagParser("generate", "Continue a prompt; text to stdout, log lines to stderr.")
    parser.usage = "vllm-lite generate [flags] [text]"
    parser.add_argument("text", nargs="?", default=None, help="The prompt; - or none reads stdin.")
    parser.add_argument("--prompt", default=None, metavar="TEXT", help="The prompt, as a flag.")
    parser.add_switch(
        "--chat", default=False, help="Put the prompt into the model's chat template."
    )
    parsed, configuration = settings.read(parser, argv, {"server.log_level": "warn"})
    prompt = _prompt(parsed.text, parsed.prompt)

    from vllm_server.cli.session import open_engine
    from vllm_server.local import sampling_params

    with open_engine(configuration.settings) as engine:
        if parsed.chat:
            prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        token_ids = engine.encode(prompt)
        engine.check(token_ids)
        room = engine.max_model_len - len(token_ids)
        wanted = configuration.settings.engine.max_tokens or MAX_TOKENS
        stream = engine.submit(token_ids, sampling_params(engine.defaults, room, wanted))
        for piece in stream:
            print(piece.text, end="", flush=True)
    print()
    if stream.account.error:
        print(f"vllm-lite: error: {stream.account.error}", file=sys.stderr)
        return 1
    return 0


def _prompt(positional: str | None, flag: str | None) -> str:
    if positional not in (None, "-") and flag is not None:
        raise ConfigError("Give the prompt once: as an argument or as --prompt.")
    if flag is not None:
        return flag
    if positional in (None, "-"):
        if sys.stdin.isatty():
            raise ConfigError('Give a prompt: vllm-lite generate "Once upon a time".')
        return sys.stdin.read()
    return str(positional)
