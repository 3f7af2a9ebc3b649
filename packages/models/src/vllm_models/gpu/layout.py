"""How quantized weights of any format are held for the kernels, which all share one form.

For a weight [N, K], whose columns come in blocks of 8 * RUN and share a scale in groups of G:

    low         8 bit: uint8 [N, K]; else integers of 8 * low_bits bits [N, blocks * RUN], of which
                number i of a block has the codes of its columns i, RUN + i, 2 RUN + i, ...
    high        further bits of the codes, held likewise; absent without high_bits
    scales      [K / G, N], or the steps of which `factors` [K / 256, N] are the sizes
    offsets     [K / G, N] zero points, or what is added, or its steps
    table       float16 [16] that codes of 4 bits stand for, absent for numbers

Imports no Triton, so that weights can be brought into this form without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

_STEP_COLUMNS = 256  # columns that share a factor
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Layout(NamedTuple):
    """What a kernel has to know when it is compiled.

    A weight is `(number(code) - center - zero) * scale + added`.

    Attributes:
        number: What a code stands for: itself, an entry of the table, or a float of 4 or 8 bits.
        low_bits: 2, 4 or 8.
        high_bits: 0, 1 or 2 above these.
        group: Columns that share a scale.
        run: 16 or 32.
        center: Subtracted from every code.
        scale: Numbers, steps of factors, or exponents of 2 with 127 added.
        offset: Nothing, zero points, numbers that are added, or steps that are subtracted.
    """

    number: Literal["integer", "table", "e2m1", "e4m3"]
    low_bits: int
    high_bits: int
    group: int
    run: int
    center: int = 0
    scale: Literal["number", "step", "exponent"] = "number"
    offset: Literal["none", "zero", "number", "step"] = "none"

    @property
    def block(self) -> int:
        """Columns of a block."""
        return 8 * self.run

    @property
    def runs_per_group(self) -> int:
        """Neighbouring runs of a block that have the same scale; divides 8."""
        return math.gcd(self.group, self.block) // self.run or 1


class Planes(NamedTuple):
    """A weight [rows, columns] in this form."""

    layout: Layout
    rows: int
    columns: int
    low: Tensor
    high: Tensor | None
    scales: Tensor
    offsets: Tensor | None = None
    factors: Tensor | None = None
    offset_factors: Tensor | None = None
    table: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order in which kernels take them."""
        return self[3:]

    @property
    def num_blocks(self) -> int:
        """Blocks of a row, of which the last may be cut off."""
        return -(-self.columns // self.layout.block)


def run_for(columns: int, group: int) -> int:
    """The longest run that pads no row and lies within a group, if there is one."""
    fits = columns % 256 == 0 or columns % 128 != 0
    return 32 if fits and group % 32 == 0 else 16


def interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes in the order of a plane.

    Args:
        codes: uint8 [N, K] below 2 ** bits.
        bits: 1, 2 or 4; whole bytes stay as they are.
        run: Of the layout.

    Returns:
        Integers of 8 * bits bits [N, K / 8], padded to whole blocks.
    """
    if bits == 8:
        return codes.contiguous()
    short = -codes.shape[-1] % (8 * run)
    blocks = torch.nn.functional.pad(codes, (0, short)).unflatten(-1, (-1, 8, run))
    units = torch.zeros_like(blocks[:, :, 0], dtype=torch.int64)
    for place in range(8):
        units |= blocks[:, :, place].long() << (place * bits)
    wide = _UNITS[bits]
    if wide != torch.uint8:  # the highest bit is the sign
        units = torch.where(units >> (8 * bits - 1) > 0, units - (1 << 8 * bits), units)
    return units.flatten(1).to(wide)


def codes_of(plane: Tensor, bits: int, run: int, columns: int) -> Tensor:
    """The reverse of `interleave`: int64 [N, K]."""
    if bits == 8:
        return plane.long()
    units = plane.unflatten(-1, (-1, 1, run)).long()  # [N, blocks, 1, RUN]
    shifts = torch.arange(0, 8 * bits, bits, device=plane.device)
    codes = (units >> shifts[:, None]) & ((1 << bits) - 1)  # [N, blocks, 8, RUN]
    return codes.flatten(1)[:, :columns]


def numbers_of(planes: Planes) -> Tensor:
    """The weight as float32 [N, K]: what kernels are compared with."""
    layout, columns = planes.layout, planes.columns
    codes = codes_of(planes.low, layout.low_bits, layout.run, columns)
    if planes.high is not None:
        codes |= codes_of(planes.high, layout.high_bits, layout.run, columns) << layout.low_bits
    numbers = _numbers(codes, planes) - layout.center
    if layout.offset == "zero":
        numbers -= _spread(planes.offsets, layout.group, columns)
    weight = numbers * _scales(planes)
    if layout.offset == "number":
        weight += _spread(planes.offsets, layout.group, columns)
    if layout.offset == "step":
        steps = _spread(planes.offsets, layout.group, columns)
        weight -= steps * _spread(planes.offset_factors, _STEP_COLUMNS, columns)
    return weight


def _numbers(codes: Tensor, planes: Planes) -> Tensor:
    if planes.layout.number == "integer":
        return codes.float()
    if planes.layout.number == "table":
        assert planes.table is not None
        return planes.table.float()[codes]
    if planes.layout.number == "e4m3":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    signs = 1 - 2 * (codes >> 3)
    powers = ((codes >> 1) & 3).float()
    halves = (codes & 1).float() / 2
    return signs * torch.where(powers == 0, halves, (1 + halves) * (powers - 1).exp2())


def _scales(planes: Planes) -> Tensor:
    scales = _spread(planes.scales, planes.layout.group, planes.columns)
    if planes.layout.scale == "exponent":
        return (scales - 127).exp2()
    if planes.layout.scale == "step":
        return scales * _spread(planes.factors, _STEP_COLUMNS, planes.columns)
    return scales


def _spread(values: Tensor | None, size: int, columns: int) -> Tensor:
    """[groups, N] -> float32 [N, K]."""
    assert values is not None
    return values.T.float().repeat_interleave(size, 1)[:, :columns]


def stack_planes(weights: Sequence[Planes]) -> Planes:
    """Weights of one layout and width above one another, such as those of experts."""
    first = weights[0]
    joined = first._replace(
        rows=sum(weight.rows for weight in weights),
        low=torch.cat([weight.low for weight in weights]),
        high=None if first.high is None else torch.cat([w.high for w in weights]),
    )
    for name in ("scales", "offsets", "factors", "offset_factors"):
        if getattr(first, name) is not None:
            values = torch.cat([getattr(weight, name) for weight in weights], dim=1)
            joined = joined._replace(**{name: values})
    return joined
