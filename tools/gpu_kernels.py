"""Compiles every variant of every Triton kernel for several GPUs, on a machine that needs none.

    python tools/gpu_kernels.py                      writes docs/gpu-kernels.json and .md
    python tools/gpu_kernels.py --check              compares with them instead
    python tools/gpu_kernels.py --check --changed    the same, and trusts the figures of variants
                                                     whose source is the recorded one

A variant must compile, must fit the shared memory of the GPU, and must not spill registers if it
says so. Figures are those of the Triton version that made them: they are compared, and trusted,
under the recorded version alone; under another one the rules still hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined; the compiler is wanted

import triton
import vllm_models.gpu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_models.gpu.launch import Variant

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "gpu-kernels.json"
DOCUMENT = RECORD.with_suffix(".md")
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program may have
_FP8 = 89  # the first architecture that has it
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Usage(NamedTuple):
    """What a compiled variant takes.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread's registers that are kept in memory.
        shared: Bytes of a program.
    """

    registers: int
    spilled: int
    shared: int


class Compiled(NamedTuple):
    """A variant on one architecture: what it takes, or why it does not compile."""

    name: str
    arch: int
    usage: Usage | None
    error: str = ""


class Made(NamedTuple):
    """One line of the record.

    Attributes:
        source: Digest of everything that is compiled.
        usages: By architecture.
    """

    source: str
    usages: dict[str, Usage]


Record = dict[str, Made]


def modules() -> list[str]:
    """Every module of kernels, by name."""
    return sorted(found.name for found in pkgutil.iter_modules(vllm_models.gpu.__path__))


@cache
def variants(module: str) -> dict[str, Variant]:
    """The variants of a module by name; most modules of the package have some.

    Raises:
        ValueError: Two have the same name.
    """
    listed = getattr(importlib.import_module(f"vllm_models.gpu.{module}"), "variants", None)
    known = {variant.name: variant for variant in (listed() if listed else ())}
    if listed and len(known) != len(listed()):
        raise ValueError(f"{module}: two variants have the same name")
    return known


def archs_of(variant: Variant, archs: Sequence[int]) -> list[int]:
    """Those that have the types of a variant."""
    needs_fp8 = any("fp8" in kind for kind in variant.signature.values())
    return [arch for arch in archs if arch >= _FP8 or not needs_fp8]


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """Compile one variant for one architecture."""
    source = _source(variant)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is the report
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Compiled(variant.name, arch, None, " ".join(lines[-3:])[:400])
    registers, spilled = _resources(made.asm["cubin"])
    return Compiled(variant.name, arch, Usage(registers, spilled, made.metadata.shared))


def _source(variant: Variant) -> ASTSource:
    constants = dict(variant.constants)
    return ASTSource(
        fn=variant.kernel,
        signature=_signature(variant),
        constexprs=constants,
        attrs=_attributes(variant),
    )


def _attributes(variant: Variant) -> dict[tuple[int], list[list[object]]]:
    """Addresses and sizes are multiples of 16, as those of real models are and as a launch finds
    out; numbers that a kernel does not want to be looked at are any.
    """
    return {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(variant.kernel.params)
        if str(variant.signature.get(parameter.name, "")).startswith(("*", "i"))
        and not parameter.do_not_specialize
    }


def digest(variant: Variant) -> str:
    """Of the kernel, of what it calls, and of how it is compiled."""
    text = f"{_source(variant).hash()} {variant.num_warps} {variant.num_stages}"
    return sha256(text.encode()).hexdigest()[:16]


def _signature(variant: Variant) -> dict[str, Any]:
    """Of every argument in the order of the kernel, constants marked as such."""
    known = {**variant.signature, **dict.fromkeys(variant.constants, "constexpr")}
    return {name: known[name] for name in variant.kernel.arg_names}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from the tables of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = _RESOURCES.search(said.stdout + said.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said.stdout}{said.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, max(stack, local)


def _compile_named(task: tuple[str, str, int]) -> Compiled:
    module, name, arch = task
    return compile_variant(variants(module)[name], arch)


def compile_all(
    listed: Sequence[tuple[str, str, int]], processes: int
) -> Iterator[tuple[Variant, Compiled]]:
    """Variants by module, name and architecture, in this order."""
    if not listed:
        return
    context = get_context("spawn")  # a fork would take the compiler's threads along
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        done = pool.map(_compile_named, listed, chunksize=2)
        for (module, name, _), compiled in zip(listed, done, strict=True):
            yield variants(module)[name], compiled


def faults_of(variant: Variant, compiled: Compiled) -> Iterator[str]:
    """Rules that a compiled variant breaks."""
    where = f"{compiled.name} on sm_{compiled.arch}"
    if compiled.usage is None:
        yield f"{where} does not compile: {compiled.error}"
        return
    room = SHARED[compiled.arch]
    if compiled.usage.shared > room:
        yield f"{where} wants {compiled.usage.shared} bytes of shared memory; there are {room}"
    if variant.no_spills and compiled.usage.spilled:
        yield f"{where} spills {compiled.usage.spilled} bytes of registers"


def differences(known: Record, found: Record) -> Iterator[str]:
    """Variants whose figures are not those that are known, for the architectures found."""
    for name in sorted({*known, *found}):
        if name not in found:
            yield f"{name} is recorded but is no variant"
        elif name not in known:
            yield f"{name} is not recorded"
        else:
            for arch, usage in found[name].usages.items():
                if (was := known[name].usages.get(arch)) != usage:
                    yield f"{name} on sm_{arch}: {was} is recorded, {usage} compiled"


def markdown(record: Record, version: str) -> str:
    """The document: a row per variant, registers / spilled bytes / shared KiB per architecture."""
    archs = sorted({arch for made in record.values() for arch in made.usages}, key=int)
    lines = [
        "# Compiled GPU kernels",
        "",
        "Written by `tools/gpu_kernels.py`. Change the kernels, then run it.",
        "",
        "Every form of every Triton kernel that is compiled ahead of time, without a GPU, and what",
        "one takes: registers of a thread, bytes of a thread's registers that are spilled, KiB of",
        f"shared memory of a program. Compiled by Triton {version}; other versions give others.",
        "",
        f"| variant | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        "|---" * (len(archs) + 1) + "|",
    ]
    for name, made in sorted(record.items()):
        cells = (_cell(made.usages[arch]) if arch in made.usages else "" for arch in archs)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(usage: Usage) -> str:
    return f"{usage.registers} / {usage.spilled} / {usage.shared / 1024:g}"


def recorded() -> tuple[str, Record]:
    """The Triton version of the record, and the record; both empty if there is none."""
    if not RECORD.is_file():
        return "", {}
    fields: dict[str, Any] = json.loads(RECORD.read_text())
    return fields["triton"], {
        name: Made(source, {arch: Usage(*usage) for arch, usage in usages.items()})
        for name, (source, usages) in fields["variants"].items()
    }


def write(record: Record) -> None:
    """Record and document."""
    ordered = sorted(record.items())
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(made)}" for name, made in ordered)
    version = json.dumps(triton.__version__)
    RECORD.write_text(f'{{"triton": {version}, "variants": {{\n{lines}\n}}}}\n')
    DOCUMENT.write_text(markdown(record, triton.__version__))


def compare(record: Record, is_whole: bool) -> Iterator[str]:
    """What the record says otherwise, if it is of this Triton.

    Args:
        record: What was compiled.
        is_whole: All modules were.
    """
    version, known = recorded()
    if version != triton.__version__:
        return
    if DOCUMENT.read_text() != markdown(known, version):
        yield f"{DOCUMENT.name} is not what {RECORD.name} gives"
    yield from differences(
        known if is_whole else {name: known[name] for name in record if name in known}, record
    )


def unchanged(names: Sequence[str]) -> Record:
    """Recorded lines of variants that would be compiled from the same source by this Triton."""
    version, known = recorded()
    if version != triton.__version__:
        return {}
    listed = [variant for module in names for variant in variants(module).values()]
    return {
        variant.name: known[variant.name]
        for variant in listed
        if variant.name in known and known[variant.name].source == digest(variant)
    }


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--changed", action="store_true", help="compile what the record lacks")
    parser.add_argument("--arch", nargs="+", type=int, choices=SHARED, default=list(SHARED))
    parser.add_argument("--module", nargs="+", choices=modules(), help="these modules alone")
    parser.add_argument("--processes", type=int, default=2)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Compile, print a line per variant, and say what is wrong."""
    given = arguments().parse_args(words)
    names = given.module or modules()
    kept = unchanged(names) if given.changed else {}
    record, faults = compiled_record(names, given.arch, kept, given.processes)
    if given.check:
        faults += compare(record, given.module is None)
    elif (
        given.module or set(given.arch) != set(SHARED) or not all(m.usages for m in record.values())
    ):
        faults.append("nothing written: not all variants and architectures are compiled")
    else:
        write(record)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def compiled_record(
    names: Sequence[str], archs: Sequence[int], kept: Record, processes: int
) -> tuple[Record, list[str]]:
    """The record of some modules, and what is wrong with it.

    Args:
        names: Of the modules.
        archs: Architectures.
        kept: Lines that need not be compiled.
        processes: That compile at once.
    """
    faults: list[str] = []
    record: Record = {}
    listed: list[tuple[str, str, int]] = []
    for module in names:
        for name, variant in variants(module).items():
            record[name] = kept.get(name) or Made(digest(variant), {})
            if name not in kept:
                listed += [(module, name, arch) for arch in archs_of(variant, archs)]
                continue
            for arch, usage in kept[name].usages.items():
                faults += faults_of(variant, Compiled(name, int(arch), usage))
    for variant, compiled in compile_all(listed, processes):
        faults += faults_of(variant, compiled)
        if compiled.usage is not None:
            record[compiled.name].usages[str(compiled.arch)] = compiled.usage
            print(f"{compiled.name} sm_{compiled.arch}: {_cell(compiled.usage)}", flush=True)
    return record, faults


if __name__ == "__main__":
    sys.exit(main())
