"""The built library as Python functions, and which one this process uses.

Libraries share torch's OpenMP threads, because torch is loaded first and brings the runtime. A
second Python thread that starts parallel work would get threads of its own, so only the engine's
thread may call.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch  # brings the OpenMP runtime that libraries ask for
from torch import Tensor
from vllm_traits import ConfigError

from vllm_models.native.build import BuildError, build
from vllm_models.native.processor import InstructionSet, runnable

_LOG = logging.getLogger(__name__)
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_MATRIX = (_POINTER, _INT, _INT)  # data, numbers from row to row, type

_FUNCTIONS: dict[str, tuple[tuple[type, ...], type | None]] = {
    "dense_linear": ((_POINTER, *_MATRIX, _POINTER, *_MATRIX, _INT), ctypes.c_int),
    "dense_experts": (
        (_POINTER, _INT, _POINTER, _POINTER, *_MATRIX, _POINTER, *_MATRIX),
        ctypes.c_int,
    ),
    "dense_pack": ((_POINTER, _POINTER), None),
    "dense_gather": ((_POINTER, _INT, _POINTER, _INT, _POINTER), None),
    "blocks_linear": ((_POINTER, _INT, *_MATRIX, _POINTER, *_MATRIX, _INT), ctypes.c_int),
    "blocks_experts": (
        (_POINTER, _INT, _INT, _POINTER, _POINTER, *_MATRIX, _POINTER, *_MATRIX),
        ctypes.c_int,
    ),
    "blocks_bytes": ((_POINTER,), _INT),
    "blocks_pack": ((_POINTER, _POINTER), None),
    "grouped_pack": ((_POINTER, _POINTER, _POINTER, _POINTER), None),
    "awq_turn": ((_POINTER, _INT, _INT, _POINTER), None),
    "blocks_gather": ((_POINTER, _POINTER, _INT, _POINTER), None),
    "attention_bf16": ((_POINTER, _POINTER, _INT), ctypes.c_int),
    "attention_f32": ((_POINTER, _POINTER, _INT), ctypes.c_int),
    "kv_write_bf16": ((_POINTER,), None),
    "kv_write_f32": ((_POINTER,), None),
    "rms_norm": ((_POINTER,), None),
    "gate_rows": ((_POINTER,), None),
    "turn_angles": ((_POINTER,), None),
    "rotate_heads": ((_POINTER,), None),
    "choose_experts": ((_POINTER,), ctypes.c_int),
    "sort_choices": ((_POINTER,), None),
    "add_answers": ((_POINTER,), None),
    "step_inputs": ((_POINTER,), None),
    "choose_tokens": ((_POINTER,), ctypes.c_int),
    "convert_numbers": ((_POINTER, _POINTER, _INT, _INT, _INT), None),
    "add_numbers": ((_POINTER, _POINTER, _POINTER, _INT, _INT), None),
    "replay": ((_POINTER, _INT), _INT),
    "read_memory": ((_POINTER, _INT), ctypes.c_float),
    "copy_memory": ((_POINTER, _POINTER, _INT), None),
}


class Function:
    """A C function that tells its library's listener what it was called with.

    Attributes:
        address: Where it lies.
        is_checked: Its result says whether it succeeded.
    """

    __slots__ = ("_library", "_run", "address", "is_checked")

    def __init__(self, library: Library, name: str) -> None:
        run = getattr(library.loaded, name)
        run.argtypes, run.restype = _FUNCTIONS[name]
        self._library = library
        self._run = run
        self.address: int = ctypes.cast(run, ctypes.c_void_p).value or 0
        self.is_checked = run.restype is ctypes.c_int

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        result = self._run(*arguments)
        if self._library.listener is not None:
            self._library.listener(self, arguments, result)
        return result


class Library:
    """The C functions of one instruction-set class; the sources say what they take.

    Attributes:
        kind: The class.
        listener: Told of every call: the function, its arguments and its result.
    """

    def __init__(self, kind: InstructionSet) -> None:
        self.kind = kind
        self.listener: Callable[[Function, tuple[Any, ...], Any], None] | None = None
        self.loaded = ctypes.CDLL(str(build(kind)))
        self.dense_linear = Function(self, "dense_linear")
        self.dense_experts = Function(self, "dense_experts")
        self.dense_pack = Function(self, "dense_pack")
        self.dense_gather = Function(self, "dense_gather")
        self.blocks_linear = Function(self, "blocks_linear")
        self.blocks_experts = Function(self, "blocks_experts")
        self.blocks_bytes = Function(self, "blocks_bytes")
        self.blocks_pack = Function(self, "blocks_pack")
        self.grouped_pack = Function(self, "grouped_pack")
        self.awq_turn = Function(self, "awq_turn")
        self.blocks_gather = Function(self, "blocks_gather")
        self.attention_bf16 = Function(self, "attention_bf16")
        self.attention_f32 = Function(self, "attention_f32")
        self.kv_write_bf16 = Function(self, "kv_write_bf16")
        self.kv_write_f32 = Function(self, "kv_write_f32")
        self.rms_norm = Function(self, "rms_norm")
        self.gate_rows = Function(self, "gate_rows")
        self.turn_angles = Function(self, "turn_angles")
        self.rotate_heads = Function(self, "rotate_heads")
        self.choose_experts = Function(self, "choose_experts")
        self.sort_choices = Function(self, "sort_choices")
        self.add_answers = Function(self, "add_answers")
        self.step_inputs = Function(self, "step_inputs")
        self.choose_tokens = Function(self, "choose_tokens")
        self.convert_numbers = Function(self, "convert_numbers")
        self.add_numbers = Function(self, "add_numbers")
        self.replay = Function(self, "replay")
        self.read_memory = Function(self, "read_memory")
        self.copy_memory = Function(self, "copy_memory")


@functools.cache
def load(kind: InstructionSet) -> Library:
    """The library of one class, built if it is not yet.

    Raises:
        BuildError: It cannot be built or loaded.
    """
    try:
        return Library(kind)
    except OSError as error:
        raise BuildError(f"the library does not load: {error}") from error


@functools.cache
def library() -> Library | None:
    """The library this process uses: VLLM_LITE_NATIVE, or the best class; None without one.

    Says once what is lost without a library.

    Raises:
        ConfigError: VLLM_LITE_NATIVE names a class that is unknown or does not run here.
    """
    name = os.environ.get("VLLM_LITE_NATIVE", "auto")
    if name == "off":
        return None
    kinds = runnable()
    if name != "auto" and name not in kinds:
        can = ", ".join(("auto", "off", *kinds))
        raise ConfigError(f"VLLM_LITE_NATIVE is {name!r}, but this machine can: {can}.")
    try:
        return load(kinds[0] if name == "auto" else InstructionSet(name))
    except BuildError as error:
        _LOG.warning(
            "No native kernels: %s. torch computes instead: slower, most of all with "
            "quantized weights, and results may depend on the batch.",
            error,
        )
        return None


def loaded() -> Library:
    """The library of this process, where something was packed for it."""
    found = library()
    assert found is not None, "packed for kernels that are gone"
    return found


def library_for(weight: Tensor) -> Library | None:
    """The library this process uses, if it can serve a tensor of this device and type."""
    served = weight.is_cpu and weight.dtype in (torch.bfloat16, torch.float32)
    return library() if served else None


def library_for_blocks(blocks: Tensor) -> Library | None:
    """The library this process uses, if it can serve blocks on this device."""
    return library() if blocks.is_cpu else None
