"""Products of weights in every form, the sampler, experts, and the kernels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vllm_models.gguf.types import GgmlType, row_bytes
from vllm_models.gpu.launch import kernels
from vllm_models.gpu.layout import Planes, numbers_of
from vllm_models.quantization.block_planes import block_planes
from vllm_models.quantization.on_gpu import fp8_planes, grouped_planes

from benchmarks.gpu.case import Call, Case, Work

_MODELS = {
    "qwen3-0.6b": {"qkv": (4096, 1024), "gate_up": (6144, 1024), "down": (1024, 3072)},
    "llama-3.1-8b": {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
_TINY = {"tiny": {"qkv": (64, 128)}}
_ROWS = (1, 4, 16, 64, 256, 2048)
_KINDS = ("bf16", "bf16 fixed order", "fp8", "fp8 groups", "w4", "Q4_K", "Q6_K", "Q8_0")
_GROUP = 128


class Weight(NamedTuple):
    """One weight and its product with rows."""

    num_bytes: int
    multiply: Callable[[Tensor], Tensor]
    numbers: Callable[[], Tensor]


def weight(kind: str, outputs: int, columns: int, device: torch.device) -> Weight:
    """Random, in the form that the engine would hold."""
    if kind.startswith("bf16"):
        plain = (torch.randn(outputs, columns, device=device) * 0.02).bfloat16()
        fixed = kind != "bf16"
        return Weight(
            plain.nbytes,
            lambda x: kernels().dense_matmul(x, plain, fixed_order=fixed),
            lambda: plain.float(),
        )
    planes = _planes(kind, outputs, columns, device)
    multiply = kernels().fp8_matmul if kind.startswith("fp8") else kernels().grouped_matmul
    num_bytes = sum(tensor.nbytes for tensor in planes.tensors if tensor is not None)
    return Weight(num_bytes, lambda x: multiply(x, planes), lambda: numbers_of(planes))


def _planes(kind: str, outputs: int, columns: int, device: torch.device) -> Planes:
    if kind.startswith("fp8"):
        size = _GROUP if kind == "fp8 groups" else None
        numbers = torch.randn(outputs, columns, device=device) * 100
        scales = torch.full((outputs, -(-columns // (size or columns))), 2e-4, device=device)
        return fp8_planes(numbers.clamp(-448, 448).to(torch.float8_e4m3fn), scales, size)
    if kind == "w4":
        codes = torch.randint(0, 16, (outputs, columns), dtype=torch.uint8, device=device)
        scales = torch.full((outputs, columns // _GROUP), 0.005, device=device).half()
        return grouped_planes(codes, scales, bits=4, group_size=_GROUP)
    blocks = torch.randint(
        0, 60, (outputs, row_bytes(GgmlType[kind], columns)), dtype=torch.uint8, device=device
    )
    return block_planes(blocks, GgmlType[kind], columns)


def product_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Every form of weight by shape by number of rows."""
    for model, layers in (_TINY if is_tiny else _MODELS).items():
        for name, (outputs, columns) in layers.items():
            columns = 256 if is_tiny else columns
            for kind in _KINDS:
                for rows in (3,) if is_tiny else _ROWS:
                    yield _product(f"{model} {name}", kind, (outputs, columns), rows, device)


def _product(layer: str, kind: str, size: tuple[int, int], rows: int, device: torch.device) -> Case:
    outputs, columns = size
    bits = {"bf16": 16, "fp8": 8, "w4": 4.125, "Q4_K": 4.625, "Q6_K": 6.56, "Q8_0": 8.5}
    held = outputs * columns * bits[kind.split()[0]] / 8
    work = Work(
        held + 2 * rows * (outputs + columns),
        2 * rows * outputs * columns,
        kind.startswith("fp8"),
    )

    def make() -> Call:
        own = weight(kind, outputs, columns, device)
        x = torch.randn(rows, columns, device=device).bfloat16()
        return Call(lambda: own.multiply(x), lambda: x.float() @ own.numbers().T)

    return Case(f"product {kind}", f"{layer}, {rows} rows", work, make, 0.06)


def pointwise_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Norms and gates."""
    widths = (64,) if is_tiny else (1024, 4096)
    for width in widths:
        for rows in (3,) if is_tiny else (1, 256, 4096):
            shape, size = f"{rows} x {width}", 2 * rows * width
            yield Case("rms_norm", shape, Work(2 * size), _norm(rows, width, device))
            yield Case("add_rms_norm", shape, Work(4 * size), _add_norm(rows, width, device))
            yield Case("silu_mul", shape, Work(3 * size), _gate(rows, width, device))


def _norm(rows: int, width: int, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        x, scale = _randn(rows, width, device=device), _randn(width, device=device)
        return Call(lambda: kernels().rms_norm(x, scale, 1e-6), lambda: _normed(x, scale))

    return make


def _add_norm(rows: int, width: int, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        x, residual = (_randn(rows, width, device=device) for _ in range(2))
        scale = _randn(width, device=device)
        return Call(
            lambda: kernels().add_rms_norm(x, residual, scale, 1e-6)[1],
            lambda: _normed(x + residual, scale),
        )

    return make


def _gate(rows: int, width: int, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        x = _randn(rows, 2 * width, device=device)
        gate, up = x.float().chunk(2, -1)
        return Call(lambda: kernels().silu_mul(x), lambda: torch.nn.functional.silu(gate) * up)

    return make


def _randn(*size: int, device: torch.device) -> Tensor:
    return torch.randn(size, device=device).bfloat16()


def _normed(x: Tensor, scale: Tensor) -> Tensor:
    wide = x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * scale.float()


def sampler_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Greedy, plain and truncated sampling; the limit is one read of the logits."""
    vocab = 400 if is_tiny else 151_936
    for rows in (3,) if is_tiny else (1, 32, 256):
        for name, params in (
            ("greedy", (0.0, 0, 1.0, 0.0)),
            ("temperature", (1.0, 0, 1.0, 0.0)),
            ("top-k", (1.0, 50, 1.0, 0.0)),
            ("top-p", (1.0, 0, 0.9, 0.0)),
            ("min-p", (1.0, 0, 1.0, 0.05)),
        ):
            make = _sampler(rows, vocab, params, name in ("greedy", "temperature"), device)
            shape = f"{name}, {rows} x {vocab}"
            yield Case("sample", shape, Work(4 * rows * vocab), make, 0.0)


def _sampler(
    rows: int,
    vocab: int,
    params: tuple[float, int, float, float],
    is_whole: bool,
    device: torch.device,
) -> Callable[[], Call]:
    from vllm_models.gpu.sample import SamplingState, sample

    def make() -> Call:
        temperature, top_k, top_p, min_p = params
        logits = torch.randn(rows, vocab, device=device)

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        state = SamplingState(
            full(temperature),
            full(top_k, torch.int32),
            full(top_p),
            full(min_p),
            torch.randint(0, 1 << 30, (rows, 2), dtype=torch.int32, device=device),
        )
        places = torch.arange(rows, dtype=torch.int32, device=device)

        def run() -> Tensor:
            return sample(logits, places, places, state, truncated=not is_whole).token_ids

        return Call(run, (lambda: logits.argmax(-1)) if temperature == 0 else None)

    return make


def cases(device: torch.device, is_tiny: bool) -> dict[str, Sequence[Case]]:
    """By stage."""
    return {
        "products": list(product_cases(device, is_tiny)),
        "norms and gates": list(pointwise_cases(device, is_tiny)),
        "sampling": list(sampler_cases(device, is_tiny)),
        "experts": list(expert_cases(device, is_tiny)),
    }


def expert_cases(device: torch.device, is_tiny: bool) -> Iterator[Case]:
    """Routing and both products of a layer of Qwen3-30B-A3B."""
    experts, chosen, width, inner = (4, 2, 64, 32) if is_tiny else (128, 8, 2048, 768)
    for rows in (3,) if is_tiny else (1, 8, 64, 256, 2048):
        pairs = rows * chosen
        touched = experts * (1 - (1 - chosen / experts) ** rows)
        shape = f"{rows} rows, {chosen} of {experts}"
        routed = Work(2 * rows * experts + 8 * pairs)
        yield Case("choose_experts", shape, routed, _routing(rows, experts, chosen, device))
        moved = touched * 3 * width * inner * 2 + pairs * 2 * (2 * width + 4 * inner)
        work = Work(moved, 2 * pairs * 3 * width * inner)
        sizes = (rows, experts, chosen, width, inner)
        yield Case("experts bf16", shape, work, _layer(sizes, device), 0.05)


def _routing(rows: int, experts: int, chosen: int, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        logits = torch.randn(rows, experts, device=device)
        return Call(
            lambda: kernels().choose_experts(logits, chosen, True)[0],
            lambda: logits.topk(chosen).values.softmax(-1),
        )

    return make


def _layer(sizes: tuple[int, int, int, int, int], device: torch.device) -> Callable[[], Call]:
    from vllm_models.gpu.stacked import StackedExperts

    rows, experts, chosen, width, inner = sizes

    def stacked(outputs: int, columns: int) -> StackedExperts:
        drawn = torch.empty(experts, outputs, columns, dtype=torch.bfloat16, device=device)
        return StackedExperts(outputs, columns, drawn.normal_(0, 0.02))

    def make() -> Call:
        x = _randn(rows, width, device=device)
        gate_up, down = stacked(2 * inner, width), stacked(width, inner)
        weights, picked = kernels().choose_experts(
            torch.randn(rows, experts, device=device), chosen, True
        )

        def run() -> Tensor:
            plan = kernels().plan_pairs(picked, experts, x.dtype)
            hidden = kernels().silu_mul(kernels().expert_matmul(x, [gate_up], plan))
            answers = kernels().expert_matmul(hidden, [down], plan)
            return kernels().add_answers(answers, weights)

        def reference() -> Tensor:
            out = torch.zeros(rows, width, device=device)
            for place in range(chosen):
                own = picked[:, place].long()
                for row in range(rows):
                    gate, up = (gate_up.weight[own[row]].float() @ x[row].float()).chunk(2)
                    answer = down.weight[own[row]].float() @ (torch.nn.functional.silu(gate) * up)
                    out[row] += weights[row, place] * answer
            return out

        return Call(run, reference if rows <= 64 else None)

    return make
