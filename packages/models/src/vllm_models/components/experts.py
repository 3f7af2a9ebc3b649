"""The experts of a mixture: they are loaded one by one and compute together.

An expert is two linear layers with an activation between them. Where all of a layer are held in one
way, a kernel multiplies the rows of all experts at once; else each expert computes what is its own.
Which experts a token uses is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Linear
from vllm_models.native.experts import PackedExperts, add_answers, are_alike, sort_choices
from vllm_models.native.packed import TYPES


class GatedExpert(Protocol):
    """down(activate(gate_up(x))) of which the layers are its only children, in that order."""

    activate: Callable[[Tensor], Tensor]

    def children(self) -> Iterable[nn.Module]:
        """The two linear layers."""
        ...


class _Packed(NamedTuple):
    """Both layers of all experts for the CPU's kernels, with biases [E, outputs]."""

    gate_up: PackedExperts
    down: PackedExperts
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class Experts(nn.ModuleList):
    """Experts that are held alike, or are not.

    Args:
        experts: Each [N, M] -> [N, M].
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self._packed: _Packed | None = None

    @property
    def is_grouped(self) -> bool:
        """Whether one call computes all experts."""
        return self._packed is not None

    def pack(self) -> None:
        """Find out whether a kernel can compute all experts at once, after all were loaded."""
        gated = _layers(self)
        if gated is None:
            return
        weights = [[layer.packed for layer in layers] for layers in gated]
        up, down = weights
        if are_alike(up) and are_alike(down):
            biases = (_stack_biases(layers) for layers in gated)
            self._packed = _Packed(PackedExperts(up), PackedExperts(down), *biases)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weighted sum of the answers of each token's experts: [T, M] -> [T, M].

        Args:
            x: [T, M].
            weights: [T, num_chosen].
            chosen: [T, num_chosen] which experts; all others compute nothing.
        """
        if self._packed is not None:
            return self._by_kernel(self._packed, x, weights, chosen)
        return self._one_by_one(x, weights, chosen)

    def _by_kernel(self, packed: _Packed, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        library = packed.down.library
        starts, row_tokens, rows = sort_choices(library, chosen, len(self))
        given = x if x.dtype in TYPES else x.float()
        gate_up = packed.gate_up.matmul(given, starts, row_tokens, packed.gate_up_bias)
        inner = cast(GatedExpert, self[0]).activate(gate_up)
        answers = packed.down.matmul(inner, starts, bias=packed.down_bias)
        return add_answers(library, answers, weights, rows).to(x.dtype)

    def _one_by_one(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            tokens, places = (chosen == index).nonzero(as_tuple=True)
            answer = self[index](x[tokens]) * weights[tokens, places, None]
            out.index_add_(0, tokens, answer)
        return out


def _layers(experts: Iterable[nn.Module]) -> tuple[list[Linear], list[Linear]] | None:
    """The first and the second layer of all experts, if they have two with an activation."""
    up: list[Linear] = []
    down: list[Linear] = []
    for expert in experts:
        layers = list(expert.children())
        if len(layers) != 2 or not hasattr(expert, "activate"):
            return None
        for layer, known in zip(layers, (up, down), strict=True):
            if not isinstance(layer, Linear):
                return None
            known.append(layer)
    return up, down


def _stack_biases(layers: Sequence[Linear]) -> Tensor | None:
    """[E, outputs], of which the layers' own biases become parts."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        return None
    stack = torch.stack(list(biases))
    for layer, bias in zip(layers, stack, strict=True):
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return stack
