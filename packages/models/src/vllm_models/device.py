"""Which device and element type to use, and how much memory is free there."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from vllm_traits import DeviceError

from vllm_models.config import ModelConfig
from vllm_models.options import DTYPES

SMALL_WEIGHTS = 64 << 20  # bytes
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def pick_device(name: str) -> torch.device:
    """The device called `name`, or the best one for `auto`.

    Raises:
        DeviceError: It is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, is_there in present.items() if is_there))
    device = torch.device(name)
    if not present[device.type]:
        raise DeviceError(f"device is {name!r}, but this machine has none; use cpu or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device is {name!r}, but there are {torch.cuda.device_count()}.")
    return device


def pick_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The element type called `name`; for `auto` the checkpoint's, if the device is fast at it."""
    long_name = DTYPES[name]
    if long_name == "auto":
        saved = config.dtype if config.dtype in DTYPES.values() else "float32"
        return getattr(torch, saved) if _is_fast(getattr(torch, saved), device) else torch.float32
    return getattr(torch, long_name)


def _is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float32:
        return True
    if device.type == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype == torch.bfloat16 and has_bf16
    if device.type == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def set_threads(wanted: int | None, device: torch.device, weight_bytes: int) -> None:
    """Choose how many threads this process computes with on the CPU.

    A small model's operators are shorter than the time it takes to wake a second thread, and
    threads that wait for each other on busy cores are many times slower than one.
    """
    if wanted is None and device.type == "cpu" and weight_bytes < SMALL_WEIGHTS:
        wanted = 1
    if wanted is not None:
        torch.set_num_threads(wanted)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_free_host_memory(), *_free_cgroup_memory())


def _free_host_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_cgroup_memory() -> list[int]:
    """What the container's limit leaves, if there is a limit; page cache counts as free."""
    free = [1 << 62]
    for limit, usage in _CGROUP_FILES:
        try:
            used = int(Path(usage).read_text()) - _cgroup_file_cache(Path(usage).parent)
            free.append(max(0, int(Path(limit).read_text()) - used))
        except (OSError, ValueError):
            continue
    return free


def _cgroup_file_cache(folder: Path) -> int:
    """Bytes of inactive file pages, which the kernel gives back before it refuses."""
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0
