"""`vllm-lite chat`: a conversation in the terminal.

Ctrl+C stops the answer; at the prompt it clears the history, and ends the program if there is none.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vllm_traits import InvalidRequestError

from vllm_server.cli import settings
from vllm_server.config import Settings
from vllm_server.config.flags import FlagParser

if TYPE_CHECKING:
    from vllm_server.cli.talk import Talker

_HELP = "Ctrl+C stops an answer, then clears the history, then exits; Ctrl+D exits."


def run(argv: Sequence[str]) -> int:
    """The exit code is 0 when the user left."""
    parser = FlagParser("chat", "Talk to a model.")
    parser.add_argument("--i", action="store_true", help="Same as the command chat.")
    parser.add_argument("--system", default=None, metavar="TEXT", help="The system message.")
    parser.add_argument(
        "--session", default=None, metavar="ID", help="Name of the session whose blocks are kept."
    )
    parser.add_argument("--url", default=None, help="Talk to a running server instead.")
    defaults = {"server.log_level": "warn", "engine.context_cache": True}
    parsed, configuration = settings.read(parser, argv, defaults)
    session = parsed.session or f"chat-{secrets.token_hex(8)}"
    with _talker(parsed.url, session, configuration.settings) as talker:
        Conversation(talker, parsed.system).run()
    return 0


@contextlib.contextmanager
def _talker(url: str | None, session: str, chosen: Settings) -> Generator[Talker]:
    if url is None:
        from vllm_server.cli.session import open_engine
        from vllm_server.cli.talk import LocalTalker

        with open_engine(chosen) as engine:
            yield LocalTalker(engine, session, chosen.engine.max_tokens)
        return
    from vllm_server.cli.remote import RemoteTalker

    key = next((k if isinstance(k, str) else str(k["key"]) for k in chosen.auth.api_keys), None)
    model = chosen.engine.model if chosen.engine.model != "builtin" else None
    yield RemoteTalker(url, key, model, session, _parameters(chosen))


def _parameters(chosen: Settings) -> dict[str, Any]:
    """What the settings say about every answer, under the API's names, which are the same."""
    said = {"max_tokens": chosen.engine.max_tokens, **asdict(chosen.sampling)}
    return {name: value for name, value in said.items() if value is not None}


class Conversation:
    """Asks, answers and remembers."""

    def __init__(self, talker: Talker, system: str | None) -> None:
        self._talker = talker
        self._system = [{"role": "system", "content": system}] if system else []
        self._history: list[dict[str, str]] = []

    def run(self) -> None:
        """Until the user leaves."""
        _say(_HELP)
        with contextlib.suppress(ImportError):
            import_module("readline")  # gives input() a history and editing
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._history:
                    _say("\nBye.")
                    return
                self._history.clear()
                _say("\nThe history is cleared; Ctrl+C again exits.")
                continue
            if text:
                self._turn(text)

    def _turn(self, text: str) -> None:
        """One question and its answer; a stopped answer stays in the history as far as it came."""
        messages = [*self._system, *self._history, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            with contextlib.closing(_closable(self._talker, messages)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            _say(" [stopped]", end="")
        except (InvalidRequestError, OSError) as error:
            _say(f"{error}")
            return
        print(flush=True)
        self._history = [
            *messages[len(self._system) :],
            {"role": "assistant", "content": "".join(pieces)},
        ]
        turn = self._talker.turn
        _say(
            f"[{turn.tokens_left} tokens left, {turn.cached_tokens} cached, {turn.rate:.1f} tok/s]"
        )


def _closable(talker: Talker, messages: list[dict[str, str]]) -> Generator[str]:
    """A generator, so that leaving it early stops the answer."""
    yield from talker.answer(messages)


def _say(text: str, end: str = "\n") -> None:
    """About the conversation, not part of it."""
    dim = sys.stderr.isatty()
    print(f"\x1b[2m{text}\x1b[0m" if dim else text, end=end, file=sys.stderr, flush=True)
