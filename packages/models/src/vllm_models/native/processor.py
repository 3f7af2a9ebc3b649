"""Which instruction-set classes of the kernels this processor can run."""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


class InstructionSet(StrEnum):
    """A class of kernels, best first. Results are equal in every bit only within one class."""

    AVX512 = "avx512"
    AVX2 = "avx2"
    PORTABLE = "portable"

    @property
    def flags(self) -> tuple[str, ...]:
        """What the compiler is told."""
        needs = tuple(f"-m{name.replace('_', '')}" for name in _NEEDS[self])
        return (f"-DCLASS_{self.name}", *needs, *_OPTIMIZATION[self])


_NEEDS: dict[InstructionSet, tuple[str, ...]] = {
    InstructionSet.AVX512: (
        *("avx2", "fma", "f16c"),
        *("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"),
    ),
    InstructionSet.AVX2: ("avx2", "fma", "f16c"),
    InstructionSet.PORTABLE: (),
}

_OPTIMIZATION = {
    InstructionSet.AVX512: ("-O3", "-mprefer-vector-width=512"),
    InstructionSet.AVX2: ("-O3",),
    # More gains nothing where vectors are emulated, and takes the compiler three times as long.
    InstructionSet.PORTABLE: ("-O2", "-Wno-psabi"),
}


@functools.cache
def features(path: Path = _CPU_INFO) -> frozenset[str]:
    """The processor's features as Linux names them; nothing on other systems."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def runnable(present: frozenset[str] | None = None) -> tuple[InstructionSet, ...]:
    """The classes that a processor with these features can run, best first."""
    present = features() if present is None else present
    return tuple(kind for kind in InstructionSet if present.issuperset(_NEEDS[kind]))
