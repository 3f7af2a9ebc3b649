"""Experts that are held alike, so that kernels multiply the rows of all of them at once.

An expert is two linear layers with an activation between them. The weights stay where each expert
has them on a CPU; for a GPU they become parts of one tensor, or of one for each format.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vllm_models.components.linear import Dense, Linear
from vllm_models.gpu.launch import kernels_for, serves
from vllm_models.gpu.layout import Planes
from vllm_models.gpu.stacked import StackedExperts, stack_experts, stack_orders
from vllm_models.native.experts import PackedExperts, add_answers, are_alike, sort_choices
from vllm_models.native.packed import TYPES

if TYPE_CHECKING:
    from vllm_models.gpu.moe_matmul import Plan

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


class _Stack(NamedTuple):
    """One layer of experts that hold it in the same format.

    Attributes:
        weights: Of neighbouring rows of the layer, from its first to its last.
        bias: [these experts, outputs].
    """

    weights: list[StackedExperts]
    bias: Tensor | None


class _Alike(NamedTuple):
    """Experts that hold both layers in the same formats.

    Attributes:
        gate_up: The first layer.
        down: The second.
        num_experts: How many these are.
        places: int32 [all experts], which of these every one is; -1 is none of them. Absent if all
            experts are alike.
    """

    gate_up: _Stack
    down: _Stack
    num_experts: int
    places: Tensor | None

    def plan(self, gpu: ModuleType, x: Tensor, chosen: Tensor, fixed_order: bool) -> Plan:
        """Of the pairs whose experts these are."""
        if self.places is None:
            return gpu.plan_pairs(chosen, self.num_experts, x.dtype, fixed_order)
        own = self.places[chosen.long()]
        return gpu.plan_pairs(own, self.num_experts, x.dtype, fixed_order, is_partial=True)


class _OnGpu(NamedTuple):
    """Experts by the formats in which they hold their layers."""

    activate: Activate
    example: Linear  # says whether the order of sums is fixed
    groups: list[_Alike]

    def compute(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gpu = kernels_for(x)
        assert gpu is not None, "stacked for kernels that are gone"
        plans = [own.plan(gpu, x, chosen, self.example.fixed_order) for own in self.groups]
        gate_up = _product(gpu, x, [own.gate_up for own in self.groups], plans)
        answers = _product(gpu, self.activate(gate_up), [own.down for own in self.groups], plans)
        return gpu.add_answers(answers, weights)


def _product(gpu: ModuleType, x: Tensor, stacks: Sequence[_Stack], plans: Sequence[Plan]) -> Tensor:
    """One layer, of which every stack computes the pairs of its plan: [T * k, outputs]."""
    last = stacks[0].weights[-1]
    out = x.new_empty(plans[0].chosen.numel(), last.first + last.rows)
    for (weights, bias), plan in zip(stacks, plans, strict=True):
        gpu.expert_matmul(x, weights, plan, bias, out)
    return out


def _on_gpu(
    activate: Activate, gate_up: Sequence[Linear], down: Sequence[Linear]
) -> ExpertGroup | None:
    formats = [
        (_format(first), _format(second)) for first, second in zip(gate_up, down, strict=True)
    ]
    if any(None in own for own in formats) or not _same_shape(gate_up) or not _same_shape(down):
        return None
    groups: list[_Alike] = []
    for kind in dict.fromkeys(formats):
        members = [index for index, own in enumerate(formats) if own == kind]
        first = _stack([gate_up[index] for index in members])
        second = _stack([down[index] for index in members])
        if first is None or second is None:
            return None
        places = None
        if len(members) < len(formats):
            places = _places(members, len(formats)).to(first.weights[0].weight.device)
        groups.append(_Alike(first, second, len(members), places))
    return _OnGpu(activate, down[0], groups)


def _same_shape(layers: Sequence[Linear]) -> bool:
    return len({(layer.out_features, layer.in_features) for layer in layers}) == 1


def _places(members: Sequence[int], num_experts: int) -> Tensor:
    places = torch.full((num_experts,), -1, dtype=torch.int32)
    places[list(members)] = torch.arange(len(members), dtype=torch.int32)
    return places


def _format(layer: Linear) -> Hashable | None:
    """What layers have in common that can become one; None if no kernel multiplies them so."""
    if isinstance(layer.packed, _InPlanes):
        return tuple((s.rows.start, s.rows.stop, s.planes.layout) for s in layer.packed.segments)
    return layer.weight.dtype if type(layer.method) is Dense else None


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


def _stack(layers: Sequence[Linear]) -> _Stack | None:
    """Layers of one format, whose own weights become parts of the whole; None if they differ."""
    packed = [layer.packed for layer in layers if isinstance(layer.packed, _InPlanes)]
    weights = _stack_planes(packed) if packed else _stack_plain(layers)
    return None if weights is None else _Stack(weights, _stack_biases(layers))


def _stack_plain(layers: Sequence[Linear]) -> list[StackedExperts]:
    whole = torch.stack([layer.weight for layer in layers])
    for layer, weight in zip(layers, whole, strict=True):
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return [StackedExperts(whole.shape[1], whole.shape[2], whole)]


def _stack_planes(packed: Sequence[_InPlanes]) -> list[StackedExperts] | None:
    found: list[tuple[StackedExperts, list[Planes]]] = []
    for segments in zip(*(own.segments for own in packed), strict=True):
        stacked = stack_experts([segment.planes for segment in segments], segments[0].rows.start)
        if stacked is None:
            return None
        whole, parts = stacked
        orders = stack_orders([segment.order for segment in segments], whole.columns)
        found.append((whole._replace(orders=orders), parts))
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
