"""Whether the Triton kernels compute, and what every one of them tells of itself.

Imports no Triton: a process that computes on a CPU starts without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from vllm_traits import ConfigError

Mode = Literal["auto", "off", "interpret"]
_MODES: tuple[Mode, ...] = ("auto", "off", "interpret")
if os.environ.get("VLLM_LITE_TRITON") == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do


class Variant(NamedTuple):
    """One form in which a kernel is compiled, for the report of registers and shared memory.

    Attributes:
        name: Unique, such as "rms_norm-bf16-1024".
        kernel: The function under `triton.jit`.
        signature: Type of every argument that is no constant, such as "*bf16" or "i32".
        constants: Value of every `tl.constexpr`.
        num_warps: As launched.
        num_stages: As launched.
        no_spills: A spilled register is an error and not only a line of the report.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    no_spills: bool = False


@functools.cache
def mode() -> Mode:
    """VLLM_LITE_TRITON: auto (tensors on CUDA), off (plain torch), or interpret (tensors on the CPU
    as well, in Triton's interpreter: slow, for tests of the GPU's code path).

    Raises:
        ConfigError: It is none of these.
    """
    name = os.environ.get("VLLM_LITE_TRITON", "auto")
    for known in _MODES:
        if name == known:
            return known
    raise ConfigError(f"VLLM_LITE_TRITON is {name!r}, but must be one of {', '.join(_MODES)}.")


def serves(device: torch.device) -> bool:
    """Whether the Triton kernels compute what lies on a device."""
    if mode() == "interpret":
        return device.type in ("cpu", "cuda")
    return device.type == "cuda" and mode() == "auto" and _has_triton()


def has_fp8(device: torch.device) -> bool:
    """Whether the Triton kernels can write float8_e4m3fn there."""
    if not serves(device):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels (`vllm_models.gpu.kernels`) if they compute what lies where x does."""
    return kernels() if serves(x.device) else None


@functools.cache
def kernels() -> ModuleType:
    """The kernels, for a device that they serve."""
    return importlib.import_module("vllm_models.gpu.kernels")
