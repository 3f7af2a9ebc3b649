"""The two parts in which GGUF holds what makes keys and values, against the whole."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from vllm_models.gguf.latent import joined_latent
from vllm_models.weights.saved import SavedTensor
from vllm_traits import ModelError

HEADS, RANK, KEYS, VALUES = 3, 64, 32, 24


def saved(name: str, array: np.ndarray, kind: Kind, released: list[str]) -> SavedTensor:
    blocks = torch.from_numpy(gguf.quants.quantize(array, kind))
    rows = blocks if kind == Kind.F32 else blocks.flatten(0, 1)
    release = lambda: released.append(name)  # noqa: E731
    return SavedTensor(name, array.shape, kind.name, "x.gguf", 7, lambda: rows, release)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
def test_the_whole_has_each_heads_keys_before_its_values(kind: Kind) -> None:
    whole = np.random.default_rng(1).standard_normal((HEADS, KEYS + VALUES, RANK), np.float32)
    keys = np.ascontiguousarray(whole[:, :KEYS].swapaxes(1, 2))
    values = np.ascontiguousarray(whole[:, KEYS:])
    released: list[str] = []
    joined = joined_latent(
        saved("k", keys, kind, released), saved("v", values, kind, released), "kv"
    )
    assert (joined.name, joined.shape, joined.kind) == (
        "kv",
        (HEADS * (KEYS + VALUES), RANK),
        "F32",
    )
    assert joined.num_bytes == 14
    k, v = (gguf.quants.dequantize(gguf.quants.quantize(a, kind), kind) for a in (keys, values))
    expected = np.concatenate([k.swapaxes(1, 2), v], axis=1).reshape(-1, RANK)
    assert np.array_equal(joined.read().numpy(), expected)
    joined.release()
    assert released == ["k", "v"]


@pytest.mark.parametrize("shape", [(2, VALUES, RANK), (HEADS, VALUES, 32), (HEADS * VALUES, RANK)])
def test_parts_that_do_not_belong_together_are_refused(shape: tuple[int, ...]) -> None:
    keys = saved("k", np.zeros((HEADS, RANK, KEYS), np.float32), Kind.F32, [])
    values = saved("v", np.zeros(shape, np.float32), Kind.F32, [])
    with pytest.raises(ModelError, match=r"x\.gguf: k is \[3, 64, 32\] and v .* do not belong"):
        joined_latent(keys, values, "kv")
