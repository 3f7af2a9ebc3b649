"""Experts that are held alike, so that kernels multiply the rows of all of them at once.

An expert is two linear layers with an activation between them. The weights stay where each expert
has them on a CPU; for a GPU they become parts of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Dense, Linear
from vllm_models.gpu.launch import kernels_for, serves
from vllm_models.gpu.layout import Planes
from vllm_models.gpu.stacked import StackedExperts, stack_experts
from vllm_models.native.experts import PackedExperts, add_answers, are_alike, sort_choices
from vllm_models.native.packed import TYPES

Activate = Callable[[Tensor], Tensor]


class ExpertGroup(Protocol):
    """All experts of a layer."""

    def compute(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weighted sum of the answers of each token's experts: [T, M] -> [T, M].

        Args:
            x: [T, M].
            weights: [T, num_chosen].
            chosen: [T, num_chosen] which experts.
        """
        ...


def find_group(experts: Iterable[nn.Module]) -> ExpertGroup | None:
    """The experts as a group, if they are alike and there are kernels for them.

    Args:
        experts: With their weights; those that compute down(activate(gate_up(x))) have `activate`
            and the two layers as their only children, in that order.
    """
    found = _layers(experts)
    if found is None:
        return None
    activate, gate_up, down = found
    device = next(gate_up[0].parameters()).device
    return (_on_gpu if serves(device) else _on_cpu)(activate, gate_up, down)


def _layers(experts: Iterable[nn.Module]) -> tuple[Activate, list[Linear], list[Linear]] | None:
    """The activation, and the first and the second layer of all experts."""
    gate_up: list[Linear] = []
    down: list[Linear] = []
    activate = None
    for expert in experts:
        activate = getattr(expert, "activate", None)
        match list(expert.children()):
            case [Linear() as first, Linear() as second]:
                gate_up.append(first)
                down.append(second)
            case _:
                return None
    return None if activate is None else (activate, gate_up, down)


class _OnCpu(NamedTuple):
    """Biases are float32 [E, outputs]."""

    activate: Activate
    gate_up: PackedExperts
    down: PackedExperts
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def compute(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        library, num_experts = self.down.library, self.down.num_experts
        starts, row_tokens, rows = sort_choices(library, chosen, num_experts)
        given = x if x.dtype in TYPES else x.float()
        gate_up = self.gate_up.matmul(given, starts, row_tokens, self.gate_up_bias)
        answers = self.down.matmul(self.activate(gate_up), starts, bias=self.down_bias)
        return add_answers(library, answers, weights, rows).to(x.dtype)


def _on_cpu(
    activate: Activate, gate_up: Sequence[Linear], down: Sequence[Linear]
) -> ExpertGroup | None:
    first, second = [layer.packed for layer in gate_up], [layer.packed for layer in down]
    if not are_alike(first) or not are_alike(second):
        return None
    biases = (_stack_biases(gate_up), _stack_biases(down))
    return _OnCpu(activate, PackedExperts(first), PackedExperts(second), *biases)


class _OnGpu(NamedTuple):
    """Biases are [E, outputs]."""

    activate: Activate
    example: Linear  # says whether the order of sums is fixed
    gate_up: list[StackedExperts]
    down: list[StackedExperts]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def compute(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gpu = kernels_for(x)
        assert gpu is not None, "stacked for kernels that are gone"
        num_experts, fixed_order = len(self.down[0].weight), self.example.fixed_order
        plan = gpu.plan_pairs(chosen, num_experts, x.dtype, fixed_order)
        gate_up = gpu.expert_matmul(x, self.gate_up, plan, self.gate_up_bias)
        inner = self.activate(gate_up)
        answers = gpu.expert_matmul(inner, self.down, plan, self.down_bias)
        return gpu.add_answers(answers, weights)


def _on_gpu(
    activate: Activate, gate_up: Sequence[Linear], down: Sequence[Linear]
) -> ExpertGroup | None:
    first, second = _stack(gate_up), _stack(down)
    if first is None or second is None:
        return None
    biases = (_stack_biases(gate_up), _stack_biases(down))
    return _OnGpu(activate, down[0], first, second, *biases)


class _Segment(Protocol):
    """Some rows of a layer, whose columns may be held in an order of their own."""

    rows: slice
    order: Tensor | None
    planes: Planes


@runtime_checkable
class _InPlanes(Protocol):
    """A packed weight for a GPU."""

    segments: Sequence[_Segment]

    def move(self, planes: Sequence[Planes]) -> None:
        """Hold the same weights in other memory, those of every segment."""
        ...


def _stack(layers: Sequence[Linear]) -> list[StackedExperts] | None:
    """One layer of all experts, whose own weights become parts of it; None if they differ."""
    packed = [layer.packed for layer in layers]
    if all(isinstance(own, _InPlanes) for own in packed):
        return _stack_planes([own for own in packed if isinstance(own, _InPlanes)])
    shapes = {(layer.out_features, layer.in_features) for layer in layers}
    if not all(type(layer.method) is Dense for layer in layers) or len(shapes) > 1:
        return None
    whole = torch.stack([layer.weight for layer in layers])
    for layer, weight in zip(layers, whole, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return [StackedExperts(whole.shape[1], whole.shape[2], whole)]


def _stack_planes(packed: Sequence[_InPlanes]) -> list[StackedExperts] | None:
    rows = {tuple((s.rows.start, s.rows.stop) for s in own.segments) for own in packed}
    is_ordered = any(segment.order is not None for own in packed for segment in own.segments)
    if len(rows) > 1 or is_ordered:
        return None
    found: list[tuple[StackedExperts, list[Planes]]] = []
    for segments in zip(*(own.segments for own in packed), strict=True):
        stacked = stack_experts([segment.planes for segment in segments], segments[0].rows.start)
        if stacked is None:
            return None
        found.append(stacked)
    for own, planes in zip(packed, zip(*(parts for _, parts in found), strict=True), strict=True):
        own.move(planes)
    return [stacked for stacked, _ in found]


def _stack_biases(layers: Sequence[Linear]) -> Tensor | None:
    """[E, outputs], of which the layers' own biases become parts."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if not biases:
        return None
    stack = torch.stack(list(biases))
    for layer, bias in zip(layers, stack, strict=True):
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return stack
