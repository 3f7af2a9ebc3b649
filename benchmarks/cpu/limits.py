"""What the machine allows for a case: the longer of the time to read and the time to multiply.

Counts weights and KV that a step must read, and the products of weights alone, at the rate that
torch reaches in bfloat16; integer products may be faster. Attention's own products are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Size
from vllm_models.weights.checkpoint import open_checkpoint

from benchmarks.cpu.runners.plan import Task
from benchmarks.cpu.shapes import Shape


class Rates(NamedTuple):
    """Measured in the same run."""

    read: float  # bytes/s
    products: float  # floating-point operations/s


class Work(NamedTuple):
    """What a model costs.

    Attributes:
        body_bytes: Of the layers without experts.
        expert_bytes: Of all experts.
        head_bytes: Of the output head.
        body, experts, head: Their numbers of weights.
        share: Of the experts that one token takes.
        kv_bytes: Of one position.
    """

    body_bytes: int
    expert_bytes: int
    head_bytes: int
    body: int
    experts: int
    head: int
    share: float
    kv_bytes: int

    def decode(self, task: Task, rates: Rates) -> float:
        """Most tokens/s of the batch, half of the output counted as context."""
        touched = self.expert_bytes * (1 - (1 - self.share) ** task.batch)
        context = task.batch * (task.prompt + task.output / 2)
        read = self.body_bytes + touched + self.head_bytes + context * self.kv_bytes
        active = self.body + self.experts * self.share + self.head
        slowest = max(read / rates.read, 2 * active * task.batch / rates.products)
        return task.batch / slowest

    def prefill(self, rates: Rates) -> float:
        """Most prompt tokens/s, the head left out."""
        return rates.products / (2 * (self.body + self.experts * self.share))


def work_of(shape: Shape, path: Path) -> Work:
    """From the headers of a model's files."""
    held = {"body": [0, 0], "experts": [0, 0], "head": [0, 0]}
    head = "model.embed_tokens" if shape["tie_word_embeddings"] else "lm_head"
    for tensor in open_checkpoint(path).tensors():
        if tensor.name.startswith(head):
            kind = "head"
        elif tensor.name.startswith("model.embed_tokens"):
            continue
        else:
            kind = "experts" if ".experts" in tensor.name else "body"
        held[kind][0] += tensor.num_bytes
        held[kind][1] += Size(tensor.shape).numel()
    share = shape.fields.get("num_experts_per_tok", 0) / shape.fields.get("num_experts", 1)
    sizes = [held[kind][place] for place in (0, 1) for kind in ("body", "experts", "head")]
    return Work(*sizes, share, shape.kv_bytes_per_token)
