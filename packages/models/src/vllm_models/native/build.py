"""Compile the C sources beside this file into one shared library, kept in the user's cache.

The library's name is a hash of sources, flags, compiler and processor class, so a change of any
builds anew and an old one is never loaded.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_models.native.processor import InstructionSet

SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
# No contraction: a product and a sum are fused only where the source says so, or compilers would
# differ in the last bit.
_FLAGS = (
    *("-std=c11", "-fopenmp", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
_TIMEOUT = 120  # seconds


class BuildError(Exception):
    """The kernels cannot be built; the message says why, in one line."""


def find_compiler() -> list[str]:
    """The command in CC, or the first compiler that is there.

    Raises:
        BuildError: There is none.
    """
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CC is {asked[0]!r}, which is not there")
        return asked
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"there is no C compiler ({', '.join(_COMPILERS)})")


def build(kind: InstructionSet) -> Path:
    """The library of one class, from the cache or built now (a few seconds).

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    flags = (*_FLAGS, *kind.flags)
    name = f"{kind}-{_key(compiler, (*flags, openmp_runtime()))}.so"
    folder = cache_folder()
    if folder is not None and (folder / name).is_file():
        return folder / name
    if folder is None:  # of this process alone: in a shared folder anybody could leave a library
        folder = Path(tempfile.mkdtemp(prefix="vllm-lite-"))
    try:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            os.replace(_compile(compiler, flags, Path(work)), folder / name)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}") from error
    return folder / name


def openmp_runtime() -> str:
    """What to link for threads: the runtime that this process has loaded, whatever it is called
    there, or the compiler's own.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return "-fopenmp"
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line}
    return min(paths, key=lambda path: "torch" not in path, default="-fopenmp")


def cache_folder() -> Path | None:
    """Where libraries are kept; None if nothing can be written there."""
    if asked := os.environ.get("VLLM_LITE_CACHE"):
        folder = Path(asked)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lite"
    try:
        (folder / "native").mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "native"):
            return folder / "native"
    except OSError:
        return None


def _key(compiler: Sequence[str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((list(compiler), flags, sys.platform)).encode())
    digest.update(_run([*compiler, "--version"]).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _compile(compiler: Sequence[str], flags: Sequence[str], work: Path) -> Path:
    """Objects side by side, then the library."""
    objects = [work / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.c"))]
    commands = [
        [*compiler, *flags, "-c", str(SOURCES / f"{path.stem}.c"), "-o", str(path)]
        for path in objects
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(_run, commands))
    library = work / "library.so"
    parts = [*map(str, objects), openmp_runtime(), "-lm"]
    _run([*compiler, "-shared", *parts, "-o", str(library)])
    return library


def _run(command: Sequence[str]) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} fails: {_first_error(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} fails: {error}") from error


def _first_error(text: str) -> str:
    errors = [line for line in text.splitlines() if "error" in line]
    return (errors or text.strip().splitlines() or ["without a message"])[0].strip()
