"""What the device can do: copy memory, read it, multiply matrices, and start kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cpu.rows import Figure
from benchmarks.gpu.roofline import Ceilings
from benchmarks.gpu.timing import copies_for, measured, queried

_NODES = 256
_LAYERS = {  # outputs and columns
    "qwen3-0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "llama-3.1-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
}
_ROWS = (1, 16, 64, 256, 2048)


class Extent(NamedTuple):
    """How much is measured.

    Attributes:
        memory: Bytes of the copy and of the read.
        side: Of the square matrices.
        layers: Products of these models.
        rows: Of their inputs.
    """

    memory: int
    side: int
    layers: tuple[str, ...] = tuple(_LAYERS)
    rows: tuple[int, ...] = _ROWS


FULL = Extent(4 << 30, 8192)
SHORT = FULL._replace(layers=())
TINY = Extent(1 << 20, 64, ("qwen3-0.6b",), (1,))


class Meter:
    """Measures the ceilings and remembers the best of each.

    Args:
        device: Where.
        extent: How much.
    """

    def __init__(self, device: torch.device, extent: Extent) -> None:
        self._device = device
        self._extent = extent
        self._best: dict[str, float] = {}

    @property
    def ceilings(self) -> Ceilings:
        """The best rates so far; those of a short measurement if there were none."""
        if not self._best:
            for _ in self.figures(SHORT if self._device.type == "cuda" else TINY):
                pass
        products = self._best["bf16 products"]
        return Ceilings(self._best["copy"], products, self._best.get("fp8 products", products))

    def figures(self, extent: Extent | None = None) -> Iterator[Figure]:
        """One row per ceiling."""
        extent = extent or self._extent
        clocks = queried("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
        for name, found in (
            ("copy", self._copy(extent.memory)),
            ("read", self._read(extent.memory)),
            ("bf16 products", self._square(extent.side, False)),
            ("fp8 products", self._square(extent.side, True)),
        ):
            if found is not None:
                self._best[name] = max(found[0], self._best.get(name, 0.0))
                unit = "TFLOP/s" if "products" in name else "TB/s"
                yield {"ceiling": name, "rate": found[0] / 1e12, "unit": unit, "spread": found[1]}
        yield {"ceiling": "kernel in a graph", "rate": self._node(), "unit": "us", "spread": 0.0}
        yield {"clocks": clocks or "unknown"}
        for model in extent.layers:
            for outputs, columns in _LAYERS[model]:
                for rows in extent.rows:
                    yield from self._layer(model, rows, outputs, columns)

    def _copy(self, memory: int) -> tuple[float, float]:
        source = torch.ones(memory, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        time = measured([lambda: target.copy_(source)], self._device, 5)
        return 2 * memory / time.seconds, time.spread

    def _read(self, memory: int) -> tuple[float, float]:
        source = torch.ones(memory // 4, dtype=torch.float32, device=self._device)
        time = measured([lambda: source.sum()], self._device, 5)
        return memory / time.seconds, time.spread

    def _square(self, side: int, is_fp8: bool) -> tuple[float, float] | None:
        call = self._product(side, side, side, is_fp8)
        if call is None:
            return None
        time = measured([call], self._device, 5)
        return 2 * side**3 / time.seconds, time.spread

    def _node(self) -> float:
        """Microseconds of a kernel that does next to nothing, among many."""
        number = torch.zeros(1, device=self._device)
        time = measured([lambda: number.add_(1)] * _NODES, self._device)
        return time.seconds * 1e6

    def _layer(self, model: str, rows: int, outputs: int, columns: int) -> Iterator[Figure]:
        for kind, width in (("bf16", 2), ("fp8", 1)):
            weight_bytes = outputs * columns * width
            copies = copies_for(weight_bytes, self._device)
            calls = [self._product(rows, outputs, columns, kind == "fp8") for _ in range(copies)]
            if None in calls:
                continue
            time = measured([call for call in calls if call is not None], self._device)
            operations = 2 * rows * outputs * columns
            yield {
                "product": f"{model} {outputs} x {columns}",
                "weights": kind,
                "rows": rows,
                "us": time.seconds * 1e6,
                "TB/s": weight_bytes / time.seconds / 1e12,
                "TFLOP/s": operations / time.seconds / 1e12,
                "spread": time.spread,
            }

    def _product(
        self, rows: int, outputs: int, columns: int, is_fp8: bool
    ) -> Callable[[], Tensor] | None:
        """The library's; None where it has none in FP8."""
        x = torch.randn(rows, columns, device=self._device).bfloat16()
        weight = torch.randn(outputs, columns, device=self._device).mul_(0.02).bfloat16()
        if not is_fp8:
            return lambda: torch.nn.functional.linear(x, weight)
        if self._device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
            return None
        padded = torch.zeros(-(-rows // 16) * 16, columns, device=self._device)
        padded[:rows] = x
        codes, weights = padded.to(torch.float8_e4m3fn), weight.mul(50).to(torch.float8_e4m3fn).T
        one = torch.ones((), device=self._device)
        return lambda: torch._scaled_mm(
            codes, weights, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
