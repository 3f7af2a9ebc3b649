"""The safetensors files of a checkpoint folder: which they are and what is in them.

Only safetensors are ever opened. File names in an index come from strangers: they must be plain
names of files in the folder itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from vllm_traits import ModelError

from vllm_models.json_fields import JsonFields

INDEX_NAME = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The weight files, by index if there is one.

    Raises:
        ModelError: There are none, or the index is not to be trusted.
    """
    if (folder / INDEX_NAME).is_file():
        return _indexed(folder)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    found = tuple(sorted(folder.glob("*.safetensors")))
    if len(found) == 1:
        return found
    if found:
        names = ", ".join(path.name for path in found)
        raise ModelError(f"{folder} has several weight files ({names}) but no {INDEX_NAME}.")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder} has no safetensors, only {', '.join(pickled)}, which may run code when "
            "opened and never is; convert the checkpoint to safetensors."
        )
    raise ModelError(f"{folder} has no *.safetensors file.")


def _indexed(folder: Path) -> tuple[Path, ...]:
    index = JsonFields.read(folder / INDEX_NAME)
    names = set(index.need("weight_map", dict).values())
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index.source}: {name!r} is not the name of a weight file here.")
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise ModelError(f"{folder} lacks weight files that its index names: {', '.join(absent)}.")
    if not names:
        raise ModelError(f"{index.source} names no weight file.")
    return tuple(folder / name for name in sorted(names))


@contextmanager
def open_weights(path: Path, device: str = "cpu") -> Iterator[Any]:
    """A memory-mapped safetensors file.

    Raises:
        ModelError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}.") from error


def fingerprint(folder: Path) -> bytes:
    """A digest of the config and of size and samples of every weight file.

    Reading gigabytes to name them would double the time of a start, so each file gives its size,
    its beginning (the header) and evenly spaced samples.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(16 * _SAMPLE_BYTES))
            for sample in range(1, _NUM_SAMPLES + 1):
                file.seek(max(0, size * sample // _NUM_SAMPLES - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
