"""Decode attention over paged KV, in the shape of Qwen3-0.6B: how fast KV is read.

Keys and values of several layers take turns, so that no cache holds them; blocks of a sequence lie
anywhere in the pool. Rates are a share of the memory reads measured around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import NamedTuple

import torch
from vllm_models.components.context import LayerKV
from vllm_models.kernels.paged_attention import Span, paged_attention, prepare_native
from vllm_models.native.library import Library
from vllm_models.runner.kv import KVPool, allocate_kv

from benchmarks.cpu.ceilings import Meter
from benchmarks.cpu.rows import Figure, seconds

HEADS, LAYER, BLOCK = 16, LayerKV(0, 8, 128, 128), 16
CASES = ("1x1024", "1x8192", "8x1024", "8x8192", "32x128", "32x1024")
KINDS = {"bf16": torch.bfloat16, "int8": torch.int8}
KV_BYTES = 160 << 20  # of all layers: several times the last cache


class Case(NamedTuple):
    """Sequences that decode, all of one length."""

    batch: int
    context: int

    @classmethod
    def of(cls, words: str) -> Case:
        """Such as `8x1024`."""
        batch, context = map(int, words.split("x"))
        return cls(batch, context)


def figures(library: Library, cases: list[str], kinds: list[str]) -> Iterator[Figure]:
    """One row per case and type of KV."""
    meter = Meter(library)
    for words in cases:
        for kind in kinds:
            yield {
                "sequences x context": words,
                "KV": kind,
                **measured(meter, Case.of(words), kind),
            }


def measured(meter: Meter, case: Case, kind: str) -> Figure:
    """Attention of one step in all layers."""
    kv = filled(case, KINDS[kind])
    per_sequence = -(-case.context // BLOCK)
    tables = torch.randperm(case.batch * per_sequence).view(case.batch, -1)
    spans = prepare_native([Span(row, 1, case.context) for row in range(case.batch)], tables)
    q = torch.randn(case.batch, HEADS, LAYER.key_dim).bfloat16()
    scale = LAYER.key_dim**-0.5
    before = meter.read(3)
    every = seconds(lambda: [paged_attention(q, *sides, spans, scale) for sides in kv.layers], 5)
    read, each = mean((before, meter.read(3))), every / len(kv.layers)
    share = kv.num_blocks / (kv.num_blocks + 1)  # without the block that pads tables
    num_bytes = share * sum(tensor.nbytes for tensor in kv.tensors) / len(kv.layers)
    return {"us": each * 1e6, "GB/s": num_bytes / each / 1e9, "of read": num_bytes / each / read}


def filled(case: Case, stored: torch.dtype) -> KVPool:
    """A pool of random numbers with as many layers as it takes."""
    num_blocks = case.batch * -(-case.context // BLOCK)
    one = allocate_kv([LAYER], num_blocks, BLOCK, torch.bfloat16, torch.device("cpu"), stored)
    count = 1 + KV_BYTES // sum(tensor.nbytes for tensor in one.tensors)
    layers = [LAYER] * count
    kv = allocate_kv(layers, num_blocks, BLOCK, torch.bfloat16, torch.device("cpu"), stored)
    for side in kv.groups[0]:
        if side.scales is None:
            side.data.normal_()
        else:
            side.data.random_(-127, 128)
            side.scales.fill_(1 / 127)
    return kv
