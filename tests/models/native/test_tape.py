"""Recorded code gives the bits of the code itself, for other numbers in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_models.native.library import library
from vllm_models.native.pointwise import rms_norm
from vllm_models.native.tape import Tape, UnrecordableError

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there is no C compiler")


def norm(x: Tensor) -> Tensor:
    return rms_norm(LIBRARY, x, None, 1e-6)


def in_place(x: Tensor) -> Tensor:
    total = norm(x).mul_(3.0)
    total.add_(x)
    return norm(total)


CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "kernels": lambda x: norm(norm(x)),
    "sums-by-a-kernel": lambda x: x + norm(x),
    "operators-between-kernels": lambda x: norm(norm(x).cos() * 2.0).sin(),
    "sums-of-other-shapes": lambda x: norm(x) + x[:1],
    "views": lambda x: norm(x.view(2, -1)[:, :8]).flatten().split([4, 12])[1][None],
    "conversions": lambda x: norm(x.to(torch.bfloat16).float()).to(torch.float32),
    "several-results": lambda x: norm(torch.cat([part.cos() for part in norm(x).unbind()])[None]),
    "in-place": in_place,
}


def numbers(seed: int) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
@pytest.mark.parametrize("name", CODES)
def test_a_replay_gives_the_bits_of_the_code(name: str) -> None:
    code, x = CODES[name], numbers(0)[: 2 if name == "views" else 3].clone()
    tape = Tape(LIBRARY)
    result = tape.record(lambda: code(x))
    assert torch.equal(result, code(x))
    for seed in (1, 2):
        x.copy_(numbers(seed)[: len(x)])
        tape.replay()
        assert torch.equal(result, code(x))
    assert tape.num_bytes > 0


@torch.inference_mode()
@pytest.mark.parametrize(
    "code",
    [
        lambda x: norm(x) if bool(x.sum() > 0) else x,
        lambda x: x * x.max().item(),
        lambda x: x[(x[:, 0] > 0).nonzero()[:, 0]],
        lambda x: x[:, : x.argmax(-1).tolist()[0]],
    ],
)
def test_code_that_depends_on_numbers_is_refused(code: Any) -> None:
    with pytest.raises(UnrecordableError):
        Tape(LIBRARY).record(lambda: code(numbers(0)))
    assert LIBRARY is not None and LIBRARY.listener is None


@torch.inference_mode()
def test_memory_of_a_recording_is_its_own() -> None:
    x = numbers(0)
    tape = Tape(LIBRARY)
    result = tape.record(lambda: norm(norm(x) + x))
    noise = [torch.full((3, 8), 7.0) for _ in range(200)]  # would take memory that was given back
    x.copy_(numbers(1))
    tape.replay()
    assert torch.equal(result, norm(norm(x) + x))
    assert all(bool((tensor == 7).all()) for tensor in noise)
