"""The commands `vllm-lite` and `vllm-lite-server`: which sub-command runs, and its exit code.

Imports nothing heavy, so that `--help` and configuration errors are instant; each sub-command is a
module that is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import NamedTuple

from vllm_traits import ConfigError, DeviceError, ModelError, VllmLiteError

from vllm_server.config.names import nearest, sentence

CLEAN, UNEXPECTED, CONFIGURATION, MODEL, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Command(NamedTuple):
    """A sub-command.

    Attributes:
        module: Has `run(argv) -> exit code`.
        help: One line.
    """

    module: str
    help: str


COMMANDS = {
    "serve": Command("serve", "Serve the OpenAI-compatible API until a signal."),
    "chat": Command("chat", "Talk to a model in the terminal."),
    "completion": Command("completion", "Answer prompts, several at a time, and show the speed."),
    "generate": Command("generate", "Continue one prompt and print the text."),
    "tokenize": Command("tokenize", "Show the tokens of a text, without loading weights."),
    "info": Command("info", "Describe a model and what fits, without loading it."),
    "quantize": Command("quantize", "Write a model as a GGUF file with smaller weights."),
    "bench": Command("bench", "Measure a server, or the engine alone."),
}
_OLD_SWITCHES = {
    "--server": "serve",
    "--i": "chat",
    "--prompts": "completion",
    "--batch": "completion",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`vllm-lite`: needs a sub-command, or one of the switches that stand for one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and words[0] in COMMANDS:
        return _guarded(words[0], words[1:])
    for word in words:
        if word == "--":
            break
        switch = word.partition("=")[0].replace("_", "-")
        if switch in _OLD_SWITCHES:
            return _guarded(_OLD_SWITCHES[switch], words)
    return _overview("vllm-lite", words)


def server_main(argv: Sequence[str] | None = None) -> int:
    """`vllm-lite-server`: serves unless a sub-command says otherwise."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] and not words[0].startswith("-"):
        if words[0] in COMMANDS:
            return _guarded(words[0], words[1:])
        return _overview("vllm-lite-server", words)
    if words == ["--version"]:
        return _overview("vllm-lite-server", words)
    return _guarded("serve", words)


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """One sub-command, for `python -m vllm_lite.<name>`."""
    return _guarded(name, list(sys.argv[1:] if argv is None else argv))


def _overview(prog: str, words: list[str]) -> int:
    """Help and version, or a word that is no command."""
    if words == ["--version"]:
        from importlib.metadata import version

        print(f"vllm-lite {version('vllm-server')}")
        return CLEAN
    known = "\n".join(f"  {name:<12}{command.help}" for name, command in COMMANDS.items())
    usage = f"usage: {prog} COMMAND [flags]\n\n{known}\n\n{prog} COMMAND --help lists its flags."
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage)
        return CLEAN
    _complain(sentence(f"Unknown command {words[0]!r}{nearest(words[0], COMMANDS)}"))
    print(usage, file=sys.stderr)
    return CONFIGURATION


def exit_code(error: VllmLiteError) -> int:
    """The process's exit code for an error of ours."""
    match error:
        case ConfigError():
            return CONFIGURATION
        case ModelError():
            return MODEL
        case DeviceError():
            return DEVICE
        case _:
            return UNEXPECTED


def _guarded(name: str, argv: list[str]) -> int:
    """Run a sub-command; every error becomes one line and an exit code."""
    sys.excepthook = _explain
    try:
        try:
            return import_module(f"vllm_server.cli.{COMMANDS[name].module}").run(argv)
        finally:
            sys.stdout.flush()
    except VllmLiteError as error:
        if _wants_traceback():
            raise
        _complain(str(error))
        return exit_code(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLEAN


def _complain(message: str) -> None:
    print(f"vllm-lite: error: {message}", file=sys.stderr)


def _wants_traceback() -> bool:
    logs = sys.modules.get("vllm_server.logs")
    return logs is not None and logs.shows_tracebacks()


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What nobody expected: one line, or everything at log level debug. Python exits with 1."""
    if _wants_traceback():
        sys.__excepthook__(kind, error, trace)
        return
    _complain(f"unexpected {kind.__name__}: {error} (--log-level debug shows where)")
