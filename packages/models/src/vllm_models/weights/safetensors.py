"""A Hugging Face checkpoint: a folder with `config.json` and safetensors files.

Only safetensors are ever opened. File names in an index come from strangers: they must be plain
names of files in the folder itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from vllm_traits import ModelError

from vllm_models.json_fields import JsonFields
from vllm_models.weights.mapped import MappedFile
from vllm_models.weights.saved import SavedTensor

INDEX_NAME = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsCheckpoint:
    """Implements `Checkpoint`.

    Args:
        path: The folder.

    Raises:
        ModelError: `config.json` is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(
                f"{path} has no config.json; it must be a Hugging Face checkpoint"
                f"{_gguf_hint(path)}."
            )
        self.fields = JsonFields.read(config)
        generation = path / "generation_config.json"
        self.eos_token_ids = self.fields.ids("eos_token_id")
        if generation.is_file():
            self.eos_token_ids |= JsonFields.read(generation).ids("eos_token_id")

    def tensors(self) -> Iterator[SavedTensor]:
        """Every tensor of every file, in the order of the bytes."""
        for path in weight_files(self.path):
            yield from _file_tensors(path)

    def fingerprint(self) -> bytes:
        """A digest of the config and of size and samples of every weight file."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for path in weight_files(self.path):
            add_samples(digest, path)
        return digest.digest()


def add_samples(digest: hashlib._Hash, path: Path) -> None:
    """Mix in what tells a weight file from another one.

    Reading gigabytes to name them would double the time of a start, so a file gives its size, its
    beginning (the header) and evenly spaced samples.
    """
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}:".encode())
    with path.open("rb") as file:
        digest.update(file.read(16 * _SAMPLE_BYTES))
        for sample in range(1, _NUM_SAMPLES + 1):
            file.seek(max(0, size * sample // _NUM_SAMPLES - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))


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
        raise ModelError(
            f"{folder} has several weight files ({names}) but no {INDEX_NAME}. Download that too."
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise ModelError(
            f"{folder} has no safetensors, only {', '.join(pickled)}, which may run code when "
            "opened and never is; convert the checkpoint to safetensors."
        )
    raise ModelError(f"{folder} has no *.safetensors file{_gguf_hint(folder)}.")


def _gguf_hint(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.gguf"))
    return f"; to load {found[0]}, give the path of that file" if found else ""


def _indexed(folder: Path) -> tuple[Path, ...]:
    index = JsonFields.read(folder / INDEX_NAME)
    names = set(index.need("weight_map", dict).values())
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
        if not plain or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(
                f"{index.source}: {name!r} is not the name of a weight file here. Take the index "
                "from where the model comes from, and look at what else is in this one."
            )
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise ModelError(
            f"{folder} lacks weight files that its index names: {', '.join(absent)}. Download them "
            "into the folder."
        )
    if not names:
        raise ModelError(f"{index.source} names no weight file.")
    return tuple(folder / name for name in sorted(names))


def _file_tensors(path: Path) -> Iterator[SavedTensor]:
    header = _checked_header(path)
    file = MappedFile(path)
    start = 8 + int.from_bytes(bytes(file.view(0, 8).tolist()), "little")
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        place = (start + first, last - first)
        shape = tuple(entry["shape"])
        read = partial(_read, file, place, entry["dtype"], shape)
        release = partial(file.release, *place)
        yield SavedTensor(name, shape, entry["dtype"], str(path), place[1], read, release)


def _checked_header(path: Path) -> dict[str, dict[str, list[int]]]:
    """The header as JSON, after the library found that every entry fits the file."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged or not a safetensors file: {error}. Download it again."
        ) from error


def _read(file: MappedFile, place: tuple[int, int], kind: str, shape: tuple[int, ...]) -> Tensor:
    dtype = _DTYPES.get(kind, torch.uint8)
    found = file.view(*place)
    if place[0] % dtype.itemsize:
        found = found.clone()  # torch wants elements at multiples of their size
    return found.view(dtype).view(shape)
