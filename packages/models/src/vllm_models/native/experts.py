"""The linear layers of a mixture of experts as one call: the rows of each expert by its own weight.

Every row has the bits that its expert's `matmul` would give it alone, and the answers of a token
are added in the order of its choices, so it does not matter which other tokens there are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from vllm_models.native.blocks import PackedBlocks
from vllm_models.native.dense import PackedDense
from vllm_models.native.library import Library
from vllm_models.native.packed import TYPES, address


class _Routing(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "chosen", "logits", "bias")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_experts", "num_chosen", "stride")),
        *((name, ctypes.c_int64) for name in ("logits_type", "type", "renormalize")),
        ("scale", ctypes.c_float),
    )


class _Choices(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("chosen", "starts", "row_tokens", "rows")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_chosen", "num_experts")),
    )


class _Answers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "answers", "weights", "rows")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_chosen", "width", "type")),
    )


class Choices(NamedTuple):
    """One row for every expert of every token, sorted by expert.

    Attributes:
        starts: [num_experts + 1] int64; expert e has the rows from starts[e] to starts[e + 1].
        row_tokens: [T * num_chosen] int64 token of each row.
        rows: [T, num_chosen] int64 row of each choice.
    """

    starts: Tensor
    row_tokens: Tensor
    rows: Tensor


def choose_experts(
    library: Library,
    logits: Tensor,
    num_chosen: int,
    renormalize: bool,
    scale: float,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weights [T, num_chosen] and which experts [T, num_chosen] int64, the best first.

    Args:
        library: The kernels.
        logits: [T, E] float32 or bfloat16; the numbers of a row are neighbours.
        num_chosen: At most E.
        renormalize: Scale the weights of a token to a sum of 1.
        scale: Multiplies the weights in the end.
        bias: [E] float32, added for the choice alone to scores that are sigmoids; without, scores
            are a softmax.
        dtype: Of the weights, float32 or bfloat16.
    """
    (num_tokens, num_experts), (stride, step) = logits.shape, logits.stride()
    assert step == 1 and num_chosen <= num_experts, "rows of scores"
    weights = torch.empty((num_tokens, num_chosen), dtype=dtype)
    chosen = torch.empty((num_tokens, num_chosen), dtype=torch.int64)
    call = _Routing(
        *(weights.data_ptr(), chosen.data_ptr(), logits.data_ptr()),
        None if bias is None else bias.data_ptr(),
        *(num_tokens, num_experts, num_chosen, stride),
        *(TYPES[logits.dtype], TYPES[dtype], renormalize, scale),
    )
    if library.choose_experts(ctypes.byref(call)):
        raise MemoryError("no memory for the scores of experts")
    return weights, chosen


def sort_choices(library: Library, chosen: Tensor, num_experts: int) -> Choices:
    """Give every choice a row.

    Args:
        library: The kernels.
        chosen: [T, num_chosen] int64 below num_experts.
        num_experts: How many there are.
    """
    chosen = chosen.contiguous()
    starts = torch.empty(num_experts + 1, dtype=torch.int64)
    found = Choices(
        starts, torch.empty(chosen.numel(), dtype=torch.int64), torch.empty_like(chosen)
    )
    addresses = (tensor.data_ptr() for tensor in (chosen, *found))
    library.sort_choices(ctypes.byref(_Choices(*addresses, *chosen.shape, num_experts)))
    return found


def add_answers(library: Library, answers: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Each token's answers by their weights, in float32 and in the order of its choices: [T, M].

    Args:
        library: The kernels.
        answers: [T * num_chosen, M] float32 or bfloat16, contiguous.
        weights: [T, num_chosen].
        rows: [T, num_chosen] int64 row of each choice.
    """
    weights = weights.float().contiguous()
    (num_tokens, num_chosen), width = rows.shape, answers.shape[1]
    out = torch.empty((num_tokens, width), dtype=answers.dtype)
    addresses = (tensor.data_ptr() for tensor in (out, answers, weights, rows))
    sizes = (num_tokens, num_chosen, width, TYPES[answers.dtype])
    library.add_answers(ctypes.byref(_Answers(*addresses, *sizes)))
    return out


def are_alike(weights: Sequence[object]) -> TypeGuard[list[PackedDense] | list[PackedBlocks]]:
    """Whether weights are of one shape and held in one way, as `PackedExperts` wants them."""
    return None not in (kinds := {_kind(weight) for weight in weights}) and len(kinds) == 1


def _kind(weight: object) -> object:
    if isinstance(weight, PackedDense):
        return weight.dtype, weight.outputs, weight.columns
    if isinstance(weight, PackedBlocks):
        return tuple((part.outputs, part.columns) for part in weight.weights)
    return None


class PackedExperts:
    """The same layer of every expert, all of one shape and one way to hold weights.

    Args:
        experts: Packed weights, in the order of the experts; their memory is shared, not copied.
    """

    def __init__(self, experts: Sequence[PackedDense] | Sequence[PackedBlocks]) -> None:
        assert are_alike(experts), "experts are held in different ways"
        first = experts[0]
        self.library = first.library
        self.outputs, self.columns = first.outputs, first.columns
        self._kept = tuple(experts)
        self.num_experts = len(experts)
        structures, num_parts = _structures(experts)
        self._weights = (type(structures[0]) * len(structures))(*structures)
        given = (address(self._weights), self.num_experts)
        self._function: Callable[..., int] = first.library.dense_experts
        if num_parts:
            self._function = first.library.blocks_experts
            given = (given[0], num_parts, self.num_experts)
        self._arguments = given

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(expert.nbytes for expert in self._kept)

    def matmul(
        self, x: Tensor, starts: Tensor, index: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Rows of x by the transposed weight of their expert: [N, outputs] of x's dtype.

        Args:
            x: [N, columns], or with an index [any, columns]; float32 or bfloat16.
            starts: [num_experts + 1] int64 from 0 to N; expert e has the rows from starts[e] to
                starts[e + 1].
            index: [N] int64; row i is x[index[i]].
            bias: [num_experts, outputs] float32.
        """
        assert x.shape[1] == self.columns and x.stride(1) == 1, f"x is {tuple(x.shape)}"
        assert starts.shape == (self.num_experts + 1,) and starts.is_contiguous()
        assert bias is None or bias.shape == (self.num_experts, self.outputs)
        rows = len(x) if index is None else len(index)
        out = torch.empty((rows, self.outputs), dtype=x.dtype)
        failed = self._function(
            *(*self._arguments, starts.data_ptr(), _address(index)),
            *(x.data_ptr(), x.stride(0), TYPES[x.dtype], _address(bias)),
            *(out.data_ptr(), self.outputs, TYPES[out.dtype]),
        )
        if failed:
            raise MemoryError("no memory for the activations of the experts")
        return out


def _structures(
    experts: Sequence[PackedDense] | Sequence[PackedBlocks],
) -> tuple[list[ctypes.Structure], int]:
    """Every weight in turn, and how many parts an expert has; 0 if weights have no parts."""
    found: list[ctypes.Structure] = []
    num_parts = 0
    for expert in experts:
        if isinstance(expert, PackedDense):
            found.append(expert.weight)
        else:
            found += expert.weights
            num_parts = len(expert.weights)
    return found, num_parts


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous(), "must be contiguous"
    return tensor.data_ptr()


def reference(
    experts: Sequence[PackedDense] | Sequence[PackedBlocks], x: Tensor, starts: Tensor
) -> Tensor:
    """Expert by expert."""
    rows = x.split(starts.diff().tolist())
    return torch.cat([expert.matmul(own) for expert, own in zip(experts, rows, strict=True)])
