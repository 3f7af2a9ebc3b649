"""The header of a GGUF file, or of a set of them, checked before anything of it is mapped.

Knows where every tensor lies; neither what tensors and keys are for nor how weights are held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vllm_traits import ModelError

from vllm_models.gguf.types import (
    UNREADABLE_TYPES,
    GgmlType,
    ValueType,
    block_bytes,
    block_size,
)
from vllm_models.gguf.values import MAX_KEY_BYTES, BoundedFile, Value

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMENSIONS = 4
MAX_TENSOR_NAME_BYTES = 255
_VERSIONS = (2, 3)
ALIGNMENTS = frozenset(1 << power for power in range(3, 17))
_MAX_KEYS, _MAX_TENSORS, _MAX_WEIGHTS, _MAX_FILES = 1 << 16, 1 << 17, 1 << 48, 1000
_KEY_BYTES, _TENSOR_BYTES = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # of the shortest ones
_IN_SET = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class TensorInfo(NamedTuple):
    """Where a tensor is.

    Attributes:
        name: As the file has it.
        shape: Outermost dimension first, which is the reverse of the file's order.
        type: Of its blocks, which run along the last dimension.
        path: The file that holds it.
        offset: From the beginning of that file, in bytes.
        num_bytes: From there on.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file or a set says of itself.

    Attributes:
        metadata: By key; arrays are lists. A string in an array may have lone surrogates in place
            of bytes that are not UTF-8 (`surrogateescape`).
        tensors: By name, of all files in the order of the headers.
        paths: The files, the first one first.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    paths: tuple[Path, ...]


def read_header(path: Path, tensors: bool = True) -> GgufHeader:
    """Read and check the header of a file; one of a set stands for the whole set.

    Args:
        path: A GGUF file. The others of a set `name-00001-of-00003.gguf` lie in its folder.
        tensors: Whether to read where the tensors are; without, only the first file of a set is
            read and its data is not looked at.

    Raises:
        ModelError: It is damaged, of an unknown version or type, or a file of the set is missing.
    """
    paths = set_paths(path)
    first = _read_file(paths[0], tensors)
    _check_place(first, 0, len(paths))
    if not tensors or len(paths) == 1:
        return GgufHeader(first.metadata, first.tensors, paths if tensors else paths[:1])
    merged = dict(first.tensors)
    for index, other in enumerate(paths[1:], 1):
        header = _read_file(other, tensors)
        _check_place(header, index, len(paths))
        for name, info in header.tensors.items():
            if name in merged:
                raise ModelError(
                    f"{other} has the tensor {name!r}, and so has {merged[name].path.name}. The "
                    "files do not belong together; download or convert them again."
                )
            merged[name] = info
    _check_total(first, len(merged))
    return GgufHeader(first.metadata, merged, paths)


def set_paths(path: Path) -> tuple[Path, ...]:
    """All files of the set that `path` is one of, by its name; `path` alone if it is in none.

    Raises:
        ModelError: One is missing.
    """
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of a .gguf file.")
    parts = _IN_SET.fullmatch(path.name)
    if parts is None:
        return (path,)
    stem, number, count = parts[1], int(parts[2]), int(parts[3])
    if not 1 <= number <= count <= _MAX_FILES:
        raise ModelError(
            f"{path} is named as file {number} of {count}; a set has 1 to {_MAX_FILES} files."
        )
    paths = tuple(
        path.with_name(f"{stem}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)
    )
    absent = [other.name for other in paths if not other.is_file()]
    if absent:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ModelError(
            f"{path.parent} lacks {', '.join(absent[:3])}{more}, of the set of {count} files that "
            f"{path.name} is in. Download all of them into one folder."
        )
    return paths


def _check_place(header: GgufHeader, index: int, count: int) -> None:
    """A file must say of itself what its name says."""
    [path] = header.paths
    found = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if found != (index, count):
        raise ModelError(
            f"{path}: split.no and split.count are {found[0]} and {found[1]}, but the file has the "
            f"name of one with {index} and {count}. Give the files of a set their original names "
            "(name-00001-of-00003.gguf) again, all in one folder."
        )


def _check_total(first: GgufHeader, num_tensors: int) -> None:
    expected = first.metadata.get("split.tensors.count", num_tensors)
    if expected != num_tensors:
        raise ModelError(
            f"{first.paths[0]} says that its set has {expected} tensors (split.tensors.count), but "
            f"there are {num_tensors}. Download or convert the files again."
        )


def _read_file(path: Path, tensors: bool) -> GgufHeader:
    try:
        with path.open("rb") as opened:
            file = BoundedFile(path, opened)
            num_tensors, num_keys = _read_counts(file)
            metadata = _read_metadata(file, num_keys)
            found = _read_tensors(file, num_tensors, metadata) if tensors else {}
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}.") from error
    return GgufHeader(metadata, found, (path,))


def _read_counts(file: BoundedFile) -> tuple[int, int]:
    magic = file.take(4, "the magic number") if file.size >= 4 else b""
    if magic != MAGIC:
        raise file.damaged(
            f"it begins with {magic!r} instead of {MAGIC!r}"
            if magic
            else f"it has {file.size} bytes"
        )
    version = file.u32("the version")
    if version not in _VERSIONS:
        order = " (or big-endian, which is not read)" if version and version & 0xFFFF == 0 else ""
        raise ModelError(
            f"{file.path} has the GGUF version {version}{order}; versions 2 and 3 can be read. "
            "Convert the model again with a current converter."
        )
    num_tensors, num_keys = file.u64("the number of tensors"), file.u64("the number of keys")
    for count, limit, size, what in (
        (num_keys, _MAX_KEYS, _KEY_BYTES, "metadata keys"),
        (num_tensors, _MAX_TENSORS, _TENSOR_BYTES, "tensors"),
    ):
        if count > limit:
            raise file.damaged(f"it claims {count} {what}, over the limit of {limit}")
        file.require(count * size, f"a header of {count} {what}")
    return num_tensors, num_keys


def _read_metadata(file: BoundedFile, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(num_keys):
        key = file.text(f"metadata key {index}", MAX_KEY_BYTES)
        if not key.isprintable() or not key:
            raise file.damaged(f"metadata key {index}, {key[:80]!r}, is no plain name")
        if key in metadata:
            raise file.damaged(f"the metadata key {key[:80]!r} is there twice")
        kind, metadata[key] = file.value(f"the value of {key[:80]!r}")
        if key == ALIGNMENT_KEY and kind is not ValueType.U32:
            raise file.damaged(f"{ALIGNMENT_KEY} is of type {kind.name}, but must be U32")
    return metadata


def _read_tensors(
    file: BoundedFile, num_tensors: int, metadata: Mapping[str, Value]
) -> dict[str, TensorInfo]:
    alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    if alignment not in ALIGNMENTS:
        raise file.damaged(
            f"{ALIGNMENT_KEY} is {alignment}, but must be a power of two from {min(ALIGNMENTS)} "
            f"to {max(ALIGNMENTS)}"
        )
    found: dict[str, TensorInfo] = {}
    for index in range(num_tensors):
        info = _read_tensor(file, index)
        if info.name in found:
            raise file.damaged(f"the tensor {info.name!r} is there twice")
        found[info.name] = info
    start = -(-file.position // int(alignment)) * int(alignment)
    placed = {name: info._replace(offset=start + info.offset) for name, info in found.items()}
    _check_places(file, placed.values(), int(alignment))
    return placed


def _read_tensor(file: BoundedFile, index: int) -> TensorInfo:
    """One entry; its offset is still from the beginning of the data."""
    name = file.text(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    if not name.isprintable() or not name or set(name) & set("/\\"):
        raise file.damaged(f"{what} has no plain name")
    num_dimensions = file.u32(f"the number of dimensions of {what}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise file.damaged(
            f"{what} has {num_dimensions} dimensions instead of 1 to {MAX_DIMENSIONS}"
        )
    sizes = [file.u64(f"the shape of {what}") for _ in range(num_dimensions)]
    shape = tuple(reversed(sizes))
    if not 0 < math.prod(shape) <= _MAX_WEIGHTS:
        raise file.damaged(f"{what} has the impossible shape {list(shape)}")
    kind = _read_type(file, what)
    if shape[-1] % block_size(kind):
        raise file.damaged(
            f"{what} has rows of {shape[-1]} weights, which {kind.name} holds in blocks of "
            f"{block_size(kind)}"
        )
    num_bytes = math.prod(shape) // block_size(kind) * block_bytes(kind)
    return TensorInfo(name, shape, kind, file.path, file.u64(f"the offset of {what}"), num_bytes)


def _read_type(file: BoundedFile, what: str) -> GgmlType:
    number = file.u32(f"the type of {what}")
    try:
        return GgmlType(number)
    except ValueError:
        label = UNREADABLE_TYPES.get(number, "unknown")
        raise ModelError(
            f"{file.path}: {what} is of type {number} ({label}), which is not supported; readable "
            f"are {', '.join(kind.name for kind in GgmlType)}. Take another quantization of the "
            "model."
        ) from None


def _check_places(file: BoundedFile, tensors: Iterable[TensorInfo], alignment: int) -> None:
    ordered = sorted(tensors, key=lambda info: info.offset)
    for info in ordered:
        if info.offset % alignment:
            raise file.damaged(
                f"tensor {info.name!r} begins at byte {info.offset}, which is no multiple of the "
                f"alignment {alignment}"
            )
        if info.offset + info.num_bytes > file.size:
            raise file.damaged(
                f"tensor {info.name!r} ends at byte {info.offset + info.num_bytes}, but the file "
                f"has {file.size}"
            )
    for info, following in pairwise(ordered):
        if info.offset + info.num_bytes > following.offset:
            raise file.damaged(f"the tensors {info.name!r} and {following.name!r} overlap")
