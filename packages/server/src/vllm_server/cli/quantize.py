"""`vllm-lite quantize`: a model's weights as one GGUF file, with tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_models.gguf.mixture import MIXTURES, find_mixture
from vllm_models.gguf_files import is_gguf
from vllm_traits import ConfigError

from vllm_server.cli import settings
from vllm_server.config.flags import FlagParser
from vllm_server.config.names import nearest, sentence

if TYPE_CHECKING:
    from vllm_models.weights.checkpoint import Checkpoint


def run(argv: Sequence[str]) -> int:
    """The exit code is 0 when the file is complete."""
    parser = FlagParser(
        "quantize", "Write a model as a GGUF file. Its weights must not be quantized yet."
    )
    parser.usage = "vllm-lite quantize SRC DST.gguf --type TYPE [flags]"
    parser.add_argument("source", metavar="SRC", help="Folder, Hub id, GGUF file, or builtin.")
    parser.add_argument("target", metavar="DST.gguf", type=Path, help="The file to write.")
    parser.add_argument(
        "--type", required=True, metavar="TYPE", help=f"One of {', '.join(MIXTURES)}."
    )
    parser.add_switch("--force", default=False, help="Overwrite the file if it is there.")
    parsed, configuration = settings.read(parser, argv, {"server.log_level": "warn"})
    _check_target(parsed.target, parsed.force)
    mixture = find_mixture(parsed.type)
    if mixture is None:
        unknown = sentence(f"Unknown type {parsed.type!r}{nearest(parsed.type, MIXTURES)}")
        raise ConfigError(f"{unknown} Types: {', '.join(MIXTURES)}.")

    from vllm_models.gguf.export import export_gguf
    from vllm_models.weights.checkpoint import open_checkpoint

    from vllm_server.launch import find_model
    from vllm_server.progress import shown_progress

    with shown_progress() as on_progress:
        path = find_model(configuration.settings.engine, parsed.source, on_progress)
        checkpoint = open_checkpoint(path)
        described = {"general.name": _name(parsed.source), **_tokenizer(checkpoint)}
        export_gguf(checkpoint, parsed.target, mixture, described, on_progress)
    print(f"{parsed.target}: {parsed.target.stat().st_size / 2**20:.1f} MiB")
    return 0


def _check_target(path: Path, force: bool) -> None:
    if not is_gguf(path):
        raise ConfigError(f"{path} must end with .gguf.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder.")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force overwrites it.")


def _name(source: str) -> str:
    """The model's name for people."""
    path = Path(source).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else source


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """From the folder's files, or the keys of a file as they are."""
    from vllm_models.gguf.header import read_header

    from vllm_server.text.tokenizer_metadata import tokenizer_metadata

    if checkpoint.path.is_dir():
        return dict(tokenizer_metadata(checkpoint.path, checkpoint.fields.positive("vocab_size")))
    metadata = read_header(checkpoint.path, tensors=False).metadata
    return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
