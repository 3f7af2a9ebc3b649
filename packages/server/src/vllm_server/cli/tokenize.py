"""`vllm-lite tokenize`: the tokens of a text, from the tokenizer alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from vllm_traits import ConfigError

from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser


def run(argv: Sequence[str]) -> int:
    """The exit code is 0 unless the tokenizer cannot be read."""
    parser = FlagParser("tokenize", "Show the tokens of a text; loads no weights.")
    parser.usage = "vllm-lite tokenize [flags] [text]"
    parser.add_argument("text", nargs="?", default="-", help="The text; - or none reads stdin.")
    parser.add_switch("--json", default=False, help="Print the ids as one JSON list.")
    parser.add_switch(
        "--special", default=True, help="Add what the model expects around a text, such as BOS."
    )
    parsed, configuration = settings.read(parser, argv, {"server.log_level": "warn"})
    text = _text(parsed.text)

    from vllm_server.launch import find_model
    from vllm_server.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(find_model(configuration.settings.engine))
    token_ids = tokenizer.encode(text, parsed.special)
    if parsed.json:
        print(json.dumps(token_ids))
        return 0
    for token_id in token_ids:
        print(f"{token_id}\t{_shown(tokenizer.token_bytes(token_id))}")
    return 0


def _text(given: str) -> str:
    """The text; bytes of stdin that are not UTF-8 are refused, and so are those of a flag."""
    if given == "-":
        if sys.stdin.isatty():
            raise ConfigError('Give a text: vllm-lite tokenize "Once upon a time".')
        raw = sys.stdin.buffer.read()
    else:
        raw = given.encode("utf-8", "surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"The text is not UTF-8 at byte {error.start}.") from None


def _shown(piece: bytes) -> str:
    """A piece on one line: control characters and bytes of half a character are escaped."""
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
