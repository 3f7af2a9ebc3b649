"""What a step moves and computes, from shapes alone: the weights it multiplies by, the KV it reads
and writes, the logits it makes.

Activations are left out: they stay in the processor's caches. Of a mixture of experts as many count
as the tokens can choose; how many they did choose is not looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from vllm_traits import KVGroup, StepCost

from vllm_models.components.embedding import Embedding
from vllm_models.components.linear import Linear
from vllm_models.config import ModelConfig
from vllm_models.runner.inputs import Inputs


class _Weights(NamedTuple):
    """Some layers together.

    Attributes:
        num_bytes: Read in a step that uses all of them.
        flops: For one row by all of them.
    """

    num_bytes: int
    flops: int


class CostModel:
    """Costs of the steps of one model.

    Args:
        model: With its weights.
        groups: What its layers keep of a block.
        block_size: Positions of a block.
        config: Shape of the model.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[KVGroup], block_size: int, config: ModelConfig
    ) -> None:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
        head = _head(layers)
        plain = {n: m for n, m in layers.items() if not isinstance(m, Embedding) and n != head}
        experts = [n for n in plain if ".experts." in n]
        self._head = _weights([layers[head]])
        self._experts = _weights([plain.pop(name) for name in experts])
        self._always = _weights(list(plain.values()))
        self._vocab_size = layers[head].out_features
        self._expert_share = _expert_share(model, config)
        # Of each group: bytes of a position, operations per query and position, window.
        self._kv = [
            (
                group.bytes_per_block // block_size,
                2 * config.num_heads * (group.key_dim + (group.value_dim or group.key_dim)),
                len(group.layers),
                group.window,
            )
            for group in groups
        ]

    def of(self, inputs: Inputs, seconds: float) -> StepCost:
        """The cost of a step that took some seconds; nothing is launched on a CPU."""
        tokens = sum(work.chunk.num_tokens for work in inputs.works)
        samples = len(inputs.targets)
        kv_bytes, kv_flops = self._attention(inputs)
        experts = min(1.0, tokens * self._expert_share) * self._experts.num_bytes
        num_bytes = self._always.num_bytes + int(experts) + kv_bytes if tokens else 0
        flops = tokens * self._always.flops + kv_flops
        flops += int(tokens * self._expert_share * self._experts.flops)
        if samples:
            num_bytes += self._head.num_bytes + samples * self._vocab_size * 4
            flops += samples * self._head.flops
        return StepCost(num_bytes, flops, 0, seconds)

    def _attention(self, inputs: Inputs) -> tuple[int, int]:
        """Bytes of KV read and written, and operations."""
        num_bytes = flops = 0
        for work in inputs.works:
            count = work.chunk.num_tokens
            for per_position, per_pair, num_layers, window in self._kv:
                seen = work.end if not window else min(work.end, window + count - 1)
                longest = min(work.end, window or work.end)
                first = min(work.start + 1, longest)
                num_bytes += (seen + count) * per_position
                flops += (first + longest) * count // 2 * per_pair * num_layers
        return num_bytes, flops


def _head(layers: dict[str, Linear]) -> str:
    """Which layer makes the logits: the one of that name, or the table of embeddings."""
    return next((n for n in layers if n.split(".")[-1] == "lm_head"), next(iter(layers)))


def _expert_share(model: nn.Module, config: ModelConfig) -> float:
    """Of a layer's experts, how much one token uses."""
    lists = (m for n, m in model.named_modules() if n.split(".")[-1] == "experts")
    num_experts = next((len(m) for m in lists if isinstance(m, nn.ModuleList)), 0)
    fields = config.fields
    chosen = fields.get("num_experts_per_tok", int, 0) or fields.get("top_k_experts", int, 0)
    return chosen / num_experts if num_experts else 0.0


def _weights(layers: Sequence[Linear]) -> _Weights:
    num_bytes = sum(p.nbytes for layer in layers for p in layer.parameters(recurse=False))
    return _Weights(num_bytes, sum(2 * m.in_features * m.out_features for m in layers))
