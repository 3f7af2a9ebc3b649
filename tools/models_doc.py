"""Prints docs/models.md: what runs, which formats, and the tests that verify each row.

Names and counts come from the tables of the packages and of the tests; this file adds words for
people and fails where a table has a row without words. Run it in the root of the repository:
`python tools/models_doc.py > docs/models.md`.
"""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_models.gguf.architectures import ARCHITECTURES
from vllm_models.gguf.mixture import ISQ_NAMES, MIXTURES, find_isq
from vllm_models.gguf.types import UNREADABLE_TYPES, GgmlType, block_bytes, block_size
from vllm_models.native.blocks import BLOCK_TYPES
from vllm_models.quantization.scheme import SUPPORTED_METHODS
from vllm_models.registry import find_architecture, supported_architectures
from vllm_models.rope_config import ROPE_TYPES
from vllm_models.weights.saved import PLAIN_KINDS
from vllm_server.text.gguf_tokenizer import TOKENIZER_MODELS
from vllm_server.text.pretokenizers import PRE_TOKENIZERS

TESTS = Path(__file__).parents[1] / "tests" / "models"
_NOT_FIELDS = {"family", "saved_as", "shard_size", "rewrite"}  # what a variant says to its maker
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

WHAT_RUNS = {
    "DeepseekV3ForCausalLM": "DeepSeek V3, R1 and V3.1, without their layers for drafts",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 (text)",
    "Gemma3ForConditionalGeneration": "the text model of Gemma 3 checkpoints with images",
    "Gemma4ForCausalLM": "Gemma 4 (text), small, dense and with experts",
    "Gemma4ForConditionalGeneration": "the text model of Gemma 4 checkpoints with images",
    "Glm4ForCausalLM": "GLM-4-0414, GLM-Z1",
    "Glm4MoeForCausalLM": "GLM-4.5, 4.5-Air, 4.6, without their layers for drafts",
    "GptOssForCausalLM": "gpt-oss",
    "LlamaForCausalLM": "Llama 2 and 3, and what is built as they are, DeepSeek-R1-Distill-Llama "
    "for one",
    "MistralForCausalLM": "Mistral: Llama with windows",
    "MixtralForCausalLM": "Mixtral",
    "Olmo2ForCausalLM": "OLMo 2",
    "Olmo3ForCausalLM": "OLMo 3",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5, Phi-4 (not their MoE and vision forms)",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
    "Qwen2MoeForCausalLM": "Qwen1.5-MoE, Qwen2-MoE",
    "Qwen3ForCausalLM": "Qwen3, DeepSeek-R1-0528-Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3-MoE",
}
PACKED = {
    "gptq": (
        "GPTQ",
        "4 and 8 bit, any group size or whole rows, `desc_act`, symmetric or not; zero points of "
        "versions 1 and 2; Marlin's order (4 bit, symmetric)",
        "2 and 3 bit, other orders",
        "C; torch for groups that are no multiple of 32",
    ),
    "awq": (
        "AWQ",
        "4 bit with zero points, groups of 32, 64, 128 or a row",
        "other bits, the layouts `gemv` and `marlin`",
        "C",
    ),
    "fp8": (
        "FP8",
        "e4m3, one scale per tensor, per row, or per block of rows and columns",
        "e5m2",
        "torch",
    ),
    "compressed-tensors": (
        "compressed-tensors",
        "`pack-quantized` of 4 and 8 bit by group, row or tensor, with or without zero points and "
        "activation order; `float-quantized` by tensor, row or block",
        "`int-quantized` and other formats, integer activations, sparsity, a quantized KV cache",
        "C for integers in groups of a multiple of 32 or rows; torch for floats",
    ),
    "bitsandbytes": (
        "bitsandbytes",
        "4 bit NF4 and FP4, scales plain or quantized again",
        "int8",
        "torch",
    ),
    "mxfp4": ("MXFP4", "the experts of gpt-oss", "", "C"),
}
PACKED_TESTS = {"mxfp4": "quantization/test_mxfp4.py"}
TOKENIZERS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece by scores, bytes for what has no token",
    "gemma4": "merges over characters, bytes for what has no token",
}


def check(agrees: bool, fault: str) -> None:
    """End where words and tables do not agree."""
    if not agrees:
        raise SystemExit(fault)


def load(name: str) -> ModuleType:
    """A module of the tests, for its tables."""
    path = TESTS / name
    known = f"models_doc_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(known, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table."""
    yield from ("", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|")
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def codes(names: Iterable[str]) -> str:
    """Names as code, one after the other."""
    return ", ".join(f"`{name}`" for name in names)


class Verified:
    """What the tables of the tests say of each architecture."""

    def __init__(self) -> None:
        made = load("conftest.py")
        parity, gguf = load("test_parity.py"), load("gguf/test_parity.py")
        self._configs = {f: config for f, (config, _) in made.CLASSES.items()}
        self._names = {family: model.__name__ for family, (_, model) in made.CLASSES.items()}
        self._small = made.SMALL
        self.num_ways = len(parity.WAYS)
        self._variants = self._by_name(parity.VARIANTS.values())
        of_files = [*gguf.VARIANTS.values(), *(changes for changes, _ in gguf.QUANTIZED.values())]
        self._files = self._by_name(of_files)
        self._rounded = {self._names[family] for family in load("test_parity_bf16.py").FAMILIES}

    def row(self, name: str) -> tuple[str, str, str, str]:
        """Features, variants, bfloat16 and GGUF files."""
        variants = self._variants.get(name, [])
        check(bool(variants), f"test_parity.py has no variant of {name}")
        of_files = len(self._files.get(name, []))
        return (
            "; ".join(self._features(variants)) or "-",
            str(len(variants)),
            "yes" if name in self._rounded else "no",
            str(of_files) if of_files else "none",
        )

    def _by_name(self, variants: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for variant in variants:
            found.setdefault(self._names[variant.get("family", "llama")], []).append(variant)
        return found

    def _features(self, variants: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        if any(variant.get(field) for variant in variants for field in _EXPERTS):
            yield "experts"
        if any(variant.get("sliding_window") for variant in variants):
            yield "windows"
        kinds = {kind for variant in variants for kind in self._rope_types(variant)}
        if kinds := kinds - {"default"}:
            yield f"rope: {', '.join(sorted(kinds))}"

    def _rope_types(self, variant: Mapping[str, Any]) -> Iterator[str]:
        changes = {key: value for key, value in variant.items() if key not in _NOT_FIELDS}
        config = self._configs[variant.get("family", "llama")](**(self._small | changes))
        rope = config.rope_parameters
        for scaling in [rope] if "rope_type" in rope else rope.values():
            yield scaling["rope_type"]


def architectures() -> Iterator[str]:
    """The table of what runs."""
    verified = Verified()
    written: dict[str, list[str]] = {}
    for row in ARCHITECTURES:
        written.setdefault(row.model_class, []).append(row.name)
    names = supported_architectures()
    check(set(names) == WHAT_RUNS.keys(), "an architecture has no words, or words no architecture")
    rows: list[Sequence[str]] = []
    for name in names:
        base = find_architecture(name).__name__
        is_text_of = name not in written and base != name
        shown = base if is_text_of else name
        features, variants, rounded, files = verified.row(shown)
        counts = (f"as `{base}`", "", "") if is_text_of else (variants, rounded, files)
        gguf = codes(sorted(set(written.get(shown, ())))) or "-"
        rows.append((f"`{name}`", WHAT_RUNS[name], features, gguf, *counts))
    yield f"""\
## Architectures

The first entry of `architectures` in a checkpoint's `config.json` says what it is. A GGUF file
says it
by a name of its own. "Variants" are tiny random checkpoints, made by Hugging Face transformers, in
`tests/models/test_parity.py`: log-probabilities of prompt and completion must be within 1e-3 of
transformers in float32, and 32 greedy tokens the same, in each of {verified.num_ways} ways of
running
(at once, chunked, token by token, among strangers, after a prefix hit, after a preemption, with
drafts,
in the CPU's kernels). "bf16" is `tests/models/test_parity_bf16.py`: the same best token as
transformers
in bfloat16 wherever it leads by more than rounding. "Files" are the variants of
`tests/models/gguf/test_parity.py`, GGUF files written by the `gguf` package, against transformers
too.
Features are those that the variants have. No row was verified with a published checkpoint."""
    heads = ("architecture", "what runs as it", "features", "GGUF", "variants", "bf16", "files")
    yield from table(heads, rows)
    yield f"""\
Scalings of rotary positions are read in one place for every architecture: {codes(ROPE_TYPES)}.
A GGUF file of `llama` with experts is Mixtral, one with a window is Mistral; one of `olmo2` with a
window
is OLMo 3.

**Memory of sliding windows.** A window is a mask. A layer with a window holds KV blocks for the
whole
context, as one without, though the positions behind the window are never read again.
"""


def gguf_types() -> Iterator[str]:
    """The table of block types."""
    yield f"""\
### GGUF

One file, a set split in `-00001-of-0000N`, or a file in a repository (`--m REPO --f FILE.gguf`),
with
nothing beside it: configuration, tokenizer and chat template come from its metadata. Quantized
weights
stay in their blocks; a file may mix types, in one layer too. Numbers: {codes(plain_types())}."""
    rows: list[Sequence[str]] = []
    for kind in GgmlType:
        if block_size(kind) == 1:
            continue
        bits = block_bytes(kind) * 8 / block_size(kind)
        made = codes(name for name, mixture in MIXTURES.items() if mixture.most == kind)
        kernels = "C" if kind.name in BLOCK_TYPES else "torch"
        rows.append((kind.name, str(block_size(kind)), f"{bits:g}", kernels, made or "read only"))
    yield from table(("type", "weights in a block", "bits", "on a CPU", "made by"), rows)
    yield f"""\
`tests/models/gguf/test_dequantize.py` compares every type bit for bit with the `gguf` package,
`tests/models/native/test_blocks.py` the kernels with the dequantized product, and
`tests/models/gguf/test_header.py` has the hostile files. Other types are refused by name:
{", ".join(UNREADABLE_TYPES.values())}.
"""


def plain_types() -> list[str]:
    """Floats that a GGUF file may hold its weights in."""
    return [kind.name for kind in GgmlType if kind.name in PLAIN_KINDS and kind.name[0] in "FB"]


def formats() -> Iterator[str]:
    """The chapter on weight formats."""
    check(set(SUPPORTED_METHODS) == PACKED.keys(), "a format has no words, or words no format")
    yield f"""\
## Weight formats

### Safetensors

One file or shards with an index, of {codes(sorted(PLAIN_KINDS))}, cast to the type of `--dtype`.
Only
safetensors and GGUF are ever opened: a folder that has nothing but pickled weights (`.bin`, `.pt`,
`.pth`,
`.ckpt`) is refused (`tests/models/test_weights.py`).

Packed by `quantization_config`, kept packed in memory; layers that were not converted are loaded
as they
are, and one layer may mix both:"""
    rows: list[Sequence[str]] = []
    for name in SUPPORTED_METHODS:
        title, runs, refused, where = PACKED[name]
        test = PACKED_TESTS.get(name, "quantization/test_formats.py")
        rows.append((title, f"`{name}`", runs, refused or "-", where, f"`tests/models/{test}`"))
    heads = ("format", "`quant_method`", "runs", "refused by name", "on a CPU", "verified by")
    yield from table(heads, rows)
    yield """\
Each test packs random weights by the published layout and compares with the dequantized product;
`tests/models/quantization/test_checkpoints.py` has whole checkpoints. "C" are the kernels of
`vllm_models.native`, which round activations to 8 bits and scales of 32 bits to 16 where that moves
none by more than 2^-11 of itself (else torch multiplies;
`tests/models/quantization/test_grouped.py` has them on every class); "torch" dequantizes tile by
tile and
multiplies
with torch. Plain weights run in kernels too, and without a compiler torch computes everything.
"""
    yield from gguf_types()


def quantizing() -> Iterator[str]:
    """The chapter on making blocks."""
    spelled = ", ".join(f"`{name}` ({find_isq(name).most.name})" for name in ISQ_NAMES)
    yield f"""\
## Quantizing

`--isq TYPE` (or `--quant`) turns the plain weights of a checkpoint into blocks while it is loaded,
weight
by weight: {spelled}. Output head, values and the way out of the MLP get better types where the
mixtures of
llama.cpp give them; routers of experts stay as they are; rows that no block divides get Q8_0, or
stay as
they are. A checkpoint that is quantized already is refused. Verified by
`tests/models/quantization/test_isq.py`, errors by `tests/models/gguf/test_quantize.py`.

`vllm-lite quantize SRC DST.gguf --type TYPE` writes a file with tokenizer and chat template:
{codes(MIXTURES)}. Verified by `tests/models/gguf/test_export.py` and
`tests/server/test_quantize.py`. What
other readers of the file would compute differently is refused by name.
"""


def tokenizers() -> Iterator[str]:
    """The chapter on the vocabularies of GGUF files."""
    check(set(TOKENIZER_MODELS) == TOKENIZERS.keys(), "a kind of tokenizer has no words")
    yield """\
## Tokenizers

A folder needs a `tokenizer.json`. A GGUF file has its vocabulary inside, of one of these kinds
(`tokenizer.ggml.model`):"""
    yield from table(("kind", "what"), [(f"`{k}`", TOKENIZERS[k]) for k in TOKENIZER_MODELS])
    yield f"""\
Byte-level BPE cuts text into words first, by `tokenizer.ggml.pre`:
{codes(sorted(PRE_TOKENIZERS))}. Other
kinds are refused by name. Verified by `tests/server/text/test_gguf_tokenizer.py`; `vllm-lite
tokenize
--model FILE TEXT` shows the tokens of a text without reading weights."""


def document() -> str:
    """The whole text."""
    parts = [
        "# Models and formats\n\nWritten by `tools/models_doc.py` from the registry. Change that.\n"
    ]
    for chapter in (architectures, formats, quantizing, tokenizers):
        parts.extend(chapter())
    blocks = "\n".join(parts).strip().split("\n\n")
    return "\n\n".join(wrapped(block.strip("\n")) for block in blocks if block.strip()) + "\n"


def wrapped(block: str) -> str:
    """A paragraph in lines of equal length; titles and tables as they are."""
    is_prose = not block.startswith(("|", "#"))
    return textwrap.fill(block, 105, break_on_hyphens=False) if is_prose else block


if __name__ == "__main__":
    sys.stdout.write(document())
