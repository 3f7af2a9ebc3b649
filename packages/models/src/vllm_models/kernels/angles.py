"""Angles of rotary positions: positions [T] -> cosine and signed sine [T, 1, R], as `rope` wants.

Pair i of a head turns by position * frequencies[i]; frequencies [R / 2] are float32, and so are the
angles. Both factors are multiplied by the amplitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_models.native.library import library_for
from vllm_models.native.packed import TYPES
from vllm_models.native.pointwise import turn_angles


def angles(
    positions: Tensor,
    frequencies: Tensor,
    amplitude: float,
    dtype: torch.dtype,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine in a type."""
    library = library_for(frequencies)
    if library is not None and dtype in TYPES:
        return turn_angles(library, positions, frequencies, amplitude, dtype, interleaved)
    return reference(positions, frequencies, amplitude, dtype, interleaved)


def reference(
    positions: Tensor,
    frequencies: Tensor,
    amplitude: float,
    dtype: torch.dtype,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The textbook form, for every device."""
    turned = positions[:, None, None].float() * frequencies  # [T, 1, R/2]
    cos, sin = turned.cos() * amplitude, turned.sin() * amplitude
    return (
        _arranged(cos, cos, interleaved).to(dtype),
        _arranged(-sin, sin, interleaved).to(dtype),
    )


def _arranged(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """The factors of the first and the second number of each pair, where the pairs are."""
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)
