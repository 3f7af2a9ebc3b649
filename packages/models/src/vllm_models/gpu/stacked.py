"""The same layer of all experts of a mixture in one memory, plain or as `layout.Planes`.

Imports no Triton, so that weights can be brought into this form without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_models.gpu.layout import Layout, Planes

_EVERY = ("low", "high", "scales", "offsets", "factors", "offset_factors")


class StackedExperts(NamedTuple):
    """The same layer of all experts, or some rows of it.

    Attributes:
        rows: N.
        columns: K.
        weight: [E, N, K], or of planes the codes' low bits [E, ...].
        planes: The other tensors of `Planes` in their order, [E, ...] each but for the table;
            absent for plain weights.
        layout: Of the planes.
        first: Column of the result where the rows begin.
        orders: int32 [E, K]: column orders[e, k] of expert e is held as k; absent if all come as
            they are.
    """

    rows: int
    columns: int
    weight: Tensor
    planes: tuple[Tensor | None, ...] = (None,) * 6
    layout: Layout | None = None
    first: int = 0
    orders: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | int | None, ...]:
        """As kernels take them: seven tensors, of six the distance from expert to expert."""
        held = (self.weight, *self.planes)
        strides = tuple(0 if tensor is None else tensor.stride(0) for tensor in held[:-1])
        return (*held, *strides)


def stack_experts(
    planes: Sequence[Planes], first: int = 0
) -> tuple[StackedExperts, list[Planes]] | None:
    """The same weight of all experts in one memory, and each as a part of it; None if they differ.

    Args:
        planes: Of every expert.
        first: Column of the result where the rows begin.
    """
    layout, rows, columns = planes[0][:3]
    own_tables = [own.table for own in planes]
    table = own_tables[0]
    if any(own[:3] != (layout, rows, columns) for own in planes):
        return None
    if table is not None and not all(
        own is not None and torch.equal(own, table) for own in own_tables
    ):
        return None
    held = {name: _stack([getattr(own, name) for own in planes]) for name in _EVERY}
    parts = [
        own._replace(**{name: t[expert] for name, t in held.items() if t is not None})
        for expert, own in enumerate(planes)
    ]
    low, *others = held.values()
    assert low is not None
    return StackedExperts(rows, columns, low, (*others, table), layout, first), parts


def stack_orders(orders: Sequence[Tensor | None], columns: int) -> Tensor | None:
    """Of every expert, as `StackedExperts` has them.

    Args:
        orders: Integers [K], or None for columns as they come.
        columns: K.
    """
    given = next((order for order in orders if order is not None), None)
    if given is None:
        return None
    as_they_come = torch.arange(columns, device=given.device)
    return torch.stack([as_they_come if order is None else order for order in orders]).int()


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None
