"""What the kernels of paged attention know of a layer when they are compiled."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor


def parts_of(width: int) -> tuple[int, int]:
    """The largest power of two within a width, and one that holds what is left (0 or >= 16)."""
    main = max(16, 1 << (width.bit_length() - 1))
    rest = width - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def sizes(keys: Tensor, values: Tensor) -> dict[str, int | bool]:
    """What kernels know of the KV: keys [B, K, P, D], values [B, K, P, W], maybe parts of them."""
    _, num_kv_heads, block_size, dim = keys.shape
    value_dim, is_shared = values.shape[3], values.data_ptr() == keys.data_ptr()
    return dims(num_kv_heads, block_size, dim, value_dim, is_shared)


def dims(
    num_kv_heads: int, block_size: int, dim: int, value_dim: int, is_shared: bool
) -> dict[str, int | bool]:
    """The same from numbers."""
    (main, rest), (value_main, value_rest) = parts_of(dim), parts_of(value_dim)
    return {
        "IS_SHARED": is_shared,
        "NUM_KV_HEADS": num_kv_heads,
        "BLOCK_SIZE": block_size,
        **{"DIM": dim, "MAIN": main, "REST": rest},
        **{"VALUE_DIM": value_dim, "VALUE_STRIDE": dim if is_shared else value_dim},
        **{"VALUE_MAIN": value_main, "VALUE_REST": value_rest},
    }


class Shape(NamedTuple):
    """A layer of a real model, for `variants`."""

    name: str
    num_heads: int
    num_kv_heads: int
    dim: int
    value_dim: int
    is_shared: bool = False
    has_window: bool = False
    has_cap: bool = False
    has_sinks: bool = False

    @property
    def group(self) -> int:
        """Heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    def arguments(self, pool: str) -> tuple[dict[str, str], dict[str, object]]:
        """Types and constants that decode and prefill share, with blocks of 64 positions."""
        scales = {} if pool == "bf16" else dict.fromkeys(("key_scales", "value_scales"), "*fp32")
        sinks = {"sinks": "*bf16"} if self.has_sinks else {}
        signature = {
            **dict.fromkeys(("out", "q"), "*bf16"),
            **dict.fromkeys(("keys", "values"), f"*{pool}"),
            "tables": "*i32",
            **dict.fromkeys(("scale", "soft_cap"), "fp32"),
            **scales,
            **sinks,
        }
        absent = [name for name in ("key_scales", "value_scales") if not scales]
        absent += [] if sinks else ["sinks"]
        constants = {
            **dict.fromkeys(absent),
            **dims(self.num_kv_heads, 64, self.dim, self.value_dim, self.is_shared),
            **{"HAS_WINDOW": self.has_window, "HAS_CAP": self.has_cap, "GROUP": self.group},
        }
        return signature, constants


SHAPES = (
    Shape("qwen3-0.6b", 16, 8, 128, 128),
    Shape("llama-3.1-8b", 32, 8, 128, 128),
    Shape("qwen3-30b-a3b", 32, 4, 128, 128),
    Shape("gpt-oss", 64, 8, 64, 64, has_sinks=True, has_window=True),
    Shape("gemma2-9b", 16, 8, 256, 256, has_cap=True),
    Shape("latent", 128, 1, 576, 512, is_shared=True),
)
POOLS = ("bf16", "u8")  # of keys and values; bytes are those of float8_e4m3fn
