"""The library is built once, in the user's cache, whatever the machine lacks."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vllm_models.native import build as building
from vllm_models.native import library as libraries
from vllm_models.native.build import (
    BuildError,
    build,
    cache_folder,
    find_compiler,
    openmp_runtime,
)
from vllm_models.native.processor import InstructionSet, features, runnable
from vllm_traits import ConfigError

PORTABLE = InstructionSet.PORTABLE
SMALL = """
#include <omp.h>
int threads(void) { return omp_get_max_threads(); }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and one small source, since these tests build often."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "small.c").write_text(SMALL)
    monkeypatch.setattr(building, "SOURCES", sources)
    monkeypatch.setenv("VLLM_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiler(folder: Path, script: str) -> str:
    """An executable that stands for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_library_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(PORTABLE)
    assert path.parent == cache / "native"
    count = f"echo $@ >> {cache}/calls; exec cc $@"
    monkeypatch.setenv("CC", compiler(cache, count))
    other = build(PORTABLE)  # another compiler is another key
    assert other != path
    assert build(PORTABLE) == other
    calls = (cache / "calls").read_text().splitlines()
    assert [call for call in calls if "-c" in call.split()] == calls[1:2]


def test_a_change_of_source_or_class_is_another_library(cache: Path) -> None:
    first = build(PORTABLE)
    (building.SOURCES / "small.c").write_text(SMALL + "int more(void) { return 1; }\n")
    second = build(PORTABLE)
    assert len({first, second, *(build(kind) for kind in runnable())}) == len(runnable()) + 1


def test_nothing_but_the_library_is_left_in_the_cache(cache: Path) -> None:
    path = build(PORTABLE)
    assert list((cache / "native").iterdir()) == [path]


def test_builders_at_the_same_time_leave_one_whole_library(cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(build, [PORTABLE] * 4))
    assert list((cache / "native").iterdir()) == list(paths)


def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_this_process(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    assert cache_folder() is None
    temporary = cache.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    path = build(PORTABLE)
    assert path.is_file()
    assert temporary in path.parents
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_cache_follows_the_users_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LITE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vllm-lite" / "native"


def test_no_compiler_says_which_were_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BuildError, match="no C compiler"):
        find_compiler()
    monkeypatch.setenv("CC", "absent-cc -m64")
    with pytest.raises(BuildError, match="CC is 'absent-cc'"):
        find_compiler()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "without a message"),
        ("case $1 in --version) echo 1;; *) echo 'x.c:1: error: bad' >&2; exit 1;; esac", "bad"),
        ("kill -9 $$", "fails"),
    ],
)
def test_a_broken_compiler_is_an_error_of_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    monkeypatch.setenv("CC", compiler(cache.parent, script))
    with pytest.raises(BuildError, match=message) as raised:
        build(PORTABLE)
    assert "\n" not in str(raised.value)
    assert not list((cache / "native").glob("*"))


def test_without_a_compiler_torch_computes_and_one_line_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "absent-cc")
    monkeypatch.setenv("VLLM_LITE_NATIVE", "auto")
    libraries.load.cache_clear()
    libraries.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert libraries.library() is None
            assert libraries.library() is None
    finally:
        libraries.load.cache_clear()
        libraries.library.cache_clear()
    (record,) = caplog.records
    assert "No native kernels: CC is 'absent-cc', which is not there." in record.getMessage()


def test_a_class_can_be_forced_or_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(name: str) -> libraries.Library | None:
        monkeypatch.setenv("VLLM_LITE_NATIVE", name)
        libraries.library.cache_clear()
        return libraries.library()

    try:
        assert choose("off") is None
        chosen = choose("portable")
        assert chosen is not None and chosen.kind is PORTABLE
        with pytest.raises(ConfigError, match="'abacus', but this machine can: auto, off, "):
            choose("abacus")
    finally:
        libraries.library.cache_clear()


def test_classes_follow_the_processors_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 fma f16c avx512f\nprocessor : 1\n")
    assert runnable(features(info)) == (InstructionSet.AVX2, PORTABLE)
    assert runnable(features(tmp_path / "absent")) == (PORTABLE,)


def test_the_runtime_that_is_loaded_is_linked() -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert "libgomp" in openmp_runtime()  # torch has loaded it
    assert Path(openmp_runtime()).is_file()


def test_the_library_shares_the_threads_of_torch() -> None:
    """A second OpenMP runtime would bring threads of its own, which torch cannot limit."""
    check = (
        "from vllm_models.native.library import load\n"
        "from vllm_models.native.processor import InstructionSet\n"
        "load(InstructionSet.PORTABLE)\n"
        "names = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "assert len(names) == 1 and 'torch' in names.pop(), names\n"
    )
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    subprocess.run([sys.executable, "-c", check], check=True, env=dict(os.environ))
