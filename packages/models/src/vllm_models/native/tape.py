"""What a piece of code computed, to be computed again with other numbers in the same memory.

While a tape records, kernels tell it their calls, and torch its operators. Kernels are repeated by
one call of C; views and fresh memory need nothing; other operators are repeated one by one. Code
can be recorded if what it does depends on the shapes of its inputs and not on their numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode,
)

from vllm_models.native.library import Function, Library
from vllm_models.native.packed import TYPES

_ARGUMENTS = 12
_aten = torch.ops.aten
_FRESH = frozenset({_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided})
# What may stand between kernels. Choosing operators (topk, nonzero, item ...) are left out: what
# they choose may be read as Python numbers, which no tape hears.
_PLAIN = frozenset(
    {
        *(_aten.add, _aten.sub, _aten.mul, _aten.div, _aten.neg, _aten.pow, _aten.rsqrt),
        *(_aten.floor_divide, _aten.remainder, _aten.cos, _aten.sin, _aten.tanh, _aten.mean),
        *(_aten.cat, _aten.stack, _aten.clone, _aten.contiguous, _aten.to, _aten._to_copy),
        *(_aten.view, _aten.reshape, _aten.flatten, _aten.unflatten, _aten.expand, _aten.chunk),
        *(_aten.unsqueeze, _aten.squeeze, _aten.select, _aten.slice, _aten.transpose, _aten.split),
        *(_aten.split_with_sizes, _aten.index, _aten.index_select, _aten.embedding, _aten.ones),
        *(_aten.copy_, _aten.mul_, _aten.add_, _aten.gelu, _aten.silu, _aten.addcmul, _aten.roll),
        *(_aten.rms_norm, _aten.linear, _aten.detach, _aten.alias, _aten.unbind),
        *(_aten.sigmoid, _aten.clamp),
    }
)


class UnrecordableError(Exception):
    """What the code does may depend on numbers; names the operator."""


class _Call(ctypes.Structure):
    _fields_ = (
        ("run", ctypes.c_void_p),
        ("arguments", ctypes.c_int64 * _ARGUMENTS),
        ("is_checked", ctypes.c_int64),
        ("expected", ctypes.c_int64),
    )


class Tape:
    """A recording.

    Args:
        library: Whose calls are recorded.

    Attributes:
        num_bytes: Memory of the tensors that were made.
    """

    def __init__(self, library: Library) -> None:
        self.num_bytes = 0
        self._library = library
        self._kept: list[Any] = []
        self._calls: list[_Call] = []
        self._repeats: list[tuple[int, Callable[[], object]]] = []  # before which call
        self._segments: list[tuple[int, int]] = []

    def record(self, code: Callable[[], Tensor]) -> Tensor:
        """Run the code and remember it; gives its result, which every replay fills anew.

        Raises:
            UnrecordableError: What it does may depend on the numbers of a tensor.
        """
        listener, self._library.listener = self._library.listener, self._heard
        try:
            with _Operators(self):
                result = code()
        finally:
            self._library.listener = listener
        self._kept.append(result)
        calls = (_Call * len(self._calls))(*self._calls)
        self._kept.append(calls)
        borders = [0, *(place for place, _ in self._repeats), len(self._calls)]
        first, size = ctypes.addressof(calls), ctypes.sizeof(_Call)
        self._segments = [(first + a * size, b - a) for a, b in pairwise(borders)]
        return result

    def replay(self) -> None:
        """Compute everything again from what stands in the inputs now.

        Raises:
            MemoryError: A kernel found none.
        """
        repeats = iter(self._repeats)
        for address, count in self._segments:
            if count and self._library.replay(address, count) != count:
                raise MemoryError("no memory for a step of the model")
            if (following := next(repeats, None)) is not None:
                following[1]()

    def _heard(self, function: Function, arguments: tuple[Any, ...], result: Any) -> None:
        numbers: list[int] = []
        for argument in arguments:
            if isinstance(argument, int):
                numbers.append(argument)
            elif argument is None:
                numbers.append(0)
            else:  # a reference to a structure
                self._kept.append(argument._obj)
                numbers.append(ctypes.addressof(argument._obj))
        checked = (1, result) if function.is_checked else (0, 0)
        padded = (ctypes.c_int64 * _ARGUMENTS)(*numbers)
        self._calls.append(_Call(function.address, padded, *checked))

    def repeat(self, operator: Callable[[], object]) -> None:
        """Call something between the kernels heard so far and the next."""
        self._repeats.append((len(self._calls), operator))

    def add(self, a: Tensor, b: Tensor) -> Tensor | None:
        """a + b by a kernel, if they are alike; None if not."""
        if a.dtype not in TYPES or a.dtype != b.dtype or a.shape != b.shape:
            return None
        if not (a.is_contiguous() and b.is_contiguous()):
            return None
        out = self._like(a, a.dtype)
        addresses = (out.data_ptr(), a.data_ptr(), b.data_ptr())
        self._library.add_numbers(*addresses, a.numel(), TYPES[a.dtype])
        return out

    def convert(self, a: Tensor, dtype: object) -> Tensor | None:
        """The same numbers in another type by a kernel; None if it has no such type."""
        if a.dtype not in TYPES or dtype not in TYPES or a.dtype == dtype or not a.is_contiguous():
            return None
        out = self._like(a, dtype)
        types = (TYPES[dtype], TYPES[a.dtype])
        self._library.convert_numbers(out.data_ptr(), a.data_ptr(), a.numel(), *types)
        return out

    def _like(self, a: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(a, dtype=dtype)
        self.keep(out)
        self.num_bytes += out.nbytes
        return out

    def keep(self, value: Any) -> None:
        """Let something live as long as the tape."""
        self._kept.append(value)


class _Operators(TorchDispatchMode):
    """Hears torch's operators."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; the default imports the compiler, which takes a second."""
        return False

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in _PLAIN and packet not in _FRESH:
            raise UnrecordableError(str(func))
        out = None if kwargs else self._by_kernel(func, args)
        if out is not None:
            return out
        out = func(*args, **kwargs)
        self.tape.keep(out)
        made = [tensor for tensor in _tensors(out) if _memory(tensor) not in _memories(args)]
        self.tape.num_bytes += sum(tensor.nbytes for tensor in made)
        if func._schema.is_mutable:
            self.tape.repeat(lambda: func(*args, **kwargs))
        elif made and packet not in _FRESH:
            self.tape.repeat(lambda: _refill(out, func(*args, **kwargs)))
        return out

    def _by_kernel(self, func: Any, args: tuple[Any, ...]) -> Tensor | None:
        """What torch does between kernels most, if a kernel can."""
        if func is _aten.add.Tensor and isinstance(args[1], Tensor):
            return self.tape.add(args[0], args[1])
        if func is _aten.to.dtype and len(args) == 2:
            return self.tape.convert(args[0], args[1])
        return None


def as_one(code: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of code that may choose; a tape that records will repeat it as a whole.

    Args:
        code: Operators of torch that read inputs of the same memory every time, none of them as
            Python numbers, and give tensors of the same shapes; no kernels.
    """
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, _Operators):
        return code()
    with _disable_current_modes():
        results = code()
    mode.tape.keep(results)
    mode.tape.num_bytes += sum(tensor.nbytes for tensor in results)
    mode.tape.repeat(lambda: _refill(results, code()))
    return results


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a result or of arguments, nested as torch nests them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, tuple | list) else []


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _memories(arguments: tuple[Any, ...]) -> set[int]:
    return {_memory(tensor) for tensor in _tensors(arguments)}


def _refill(old: Any, new: Any) -> None:
    for mine, fresh in zip(_tensors(old), _tensors(new), strict=True):
        mine.copy_(fresh)
