"""The shortest time that the measured ceilings allow for a piece of work. Knows no engine.

Every weight that must be streamed and every position of KV that must be read, at the rate of a
copy; every product at the rate of a matrix product; nothing else. The head stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BITS = {"bf16": 16.0, "fp8": 8.0, "w4": 4 + 16 / 128}  # of a weight, scales included
_SCALE = 4  # bytes per position and head of KV in 8 bits


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, measured in the same run.

    Attributes:
        copy: Bytes/s, read and written counted.
        products: bf16 operations/s.
        fp8: FP8 operations/s; those of bf16 where there are none.
    """

    copy: float
    products: float
    fp8: float


@dataclass(frozen=True)
class Size:
    """What a model costs.

    Attributes:
        layers: How many.
        fixed: Weights of all layers without experts.
        expert: Weights of one expert of one layer.
        experts: Of a layer; 0 if it is dense.
        chosen: Experts of a token.
        head: Weights of the output head.
        kv_heads: Of a layer.
        dim: Of a KV head.
        q_heads: Of a layer.
        vocab: Tokens.
    """

    layers: int
    fixed: int
    expert: int
    experts: int
    chosen: int
    head: int
    kv_heads: int
    dim: int
    q_heads: int
    vocab: int

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Size:
        """From the fields of a `config.json`."""
        width, dim, layers = (fields[n] for n in ("hidden_size", "head_dim", "num_hidden_layers"))
        heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
        experts = fields.get("num_experts", 0)
        inner = fields["moe_intermediate_size" if experts else "intermediate_size"]
        attention = 2 * width * dim * (heads + kv_heads)
        mlp = 3 * width * inner
        return cls(
            layers=layers,
            fixed=layers * (attention + (width * experts if experts else mlp)),
            expert=mlp if experts else 0,
            experts=experts,
            chosen=fields.get("num_experts_per_tok", 0),
            head=fields["vocab_size"] * width,
            kv_heads=kv_heads,
            dim=dim,
            q_heads=heads,
            vocab=fields["vocab_size"],
        )

    @property
    def active(self) -> int:
        """Weights of the layers that a token is multiplied by."""
        return self.fixed + self.layers * self.chosen * self.expert

    def touched(self, rows: int) -> float:
        """Experts of a layer that some token of a step chooses, if all are as likely."""
        if not self.experts:
            return 0.0
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows)

    def weight_bytes(self, weights: str, rows: int) -> float:
        """Streamed by a step."""
        body = self.fixed + self.layers * self.touched(rows) * self.expert
        return body * BITS[weights] / 8 + 2 * self.head

    def kv_bytes(self, is_8_bit: bool = False) -> int:
        """Keys and values of one position."""
        head = self.dim + _SCALE if is_8_bit else 2 * self.dim
        return 2 * self.layers * self.kv_heads * head

    def product_seconds(self, weights: str, rows: int, ceilings: Ceilings) -> float:
        """All products of a step in which every row samples."""
        rate = ceilings.fp8 if weights == "fp8" else ceilings.products
        return 2 * rows * (self.active / rate + self.head / ceilings.products)


def step_seconds(
    size: Size, weights: str, context: Sequence[int], ceilings: Ceilings, is_8_bit: bool = False
) -> float:
    """Of a decode step.

    Args:
        size: Of the model.
        weights: bf16, fp8 or w4.
        context: Positions that each sequence reads.
        ceilings: Of the run.
        is_8_bit: KV is.
    """
    rows = len(context)
    read = size.weight_bytes(weights, rows) / ceilings.copy
    linear = max(read, size.product_seconds(weights, rows, ceilings))
    return linear + sum(context) * size.kv_bytes(is_8_bit) / ceilings.copy


def prompt_seconds(size: Size, prompts: Sequence[int], ceilings: Ceilings) -> float:
    """Of all prompts: products of every token, the head once each, causal attention."""
    pairs = sum(length * (length + 1) // 2 for length in prompts)
    attention = 4 * size.q_heads * size.dim * size.layers * pairs
    linear = 2 * (sum(prompts) * size.active + len(prompts) * size.head)
    return (linear + attention) / ceilings.products


def decode_contexts(prompts: Sequence[int], outputs: Sequence[int]) -> Iterator[list[int]]:
    """What the sequences read in each decode step if all begin at once and none waits."""
    for step in range(1, max(outputs)):
        yield [p + step for p, o in zip(prompts, outputs, strict=True) if o > step]


def run_seconds(
    size: Size,
    prompts: Sequence[int],
    outputs: Sequence[int],
    ceilings: Ceilings,
    is_8_bit: bool = False,
) -> float:
    """Of a whole run in bf16: prompts, all decode steps, and float32 logits once each."""
    total = prompt_seconds(size, prompts, ceilings)
    for context in decode_contexts(prompts, outputs):
        total += step_seconds(size, "bf16", context, ceilings, is_8_bit)
        total += len(context) * size.vocab * 4 / ceilings.copy
    return total
