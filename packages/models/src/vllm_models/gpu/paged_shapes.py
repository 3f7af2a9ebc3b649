"""What the kernels of paged attention know of a layer when they are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Numbers of a head at a position, read in two parts: 576 = 512 + 64.

    Attributes:
        width: How many there are.
        stride: Numbers from a position to the next in the KV.
        main: The largest power of two within the width, at least 16.
        rest: 0, or a power of two of at least 16 that holds what is left.
    """

    width: int
    stride: int
    main: int
    rest: int

    @classmethod
    def of(cls, width: int, stride: int) -> Head:
        """A head in its parts."""
        main = max(16, 1 << (width.bit_length() - 1))
        rest = width - main
        return cls(width, stride, main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0)


@dataclass(frozen=True)
class Sizes:
    """What a kernel has to know of a layer, and of its own programs, when it is compiled.

    Attributes:
        keys: A head of the keys, and of the queries.
        values: A head of the values.
        is_shared: Values are read from the keys.
        num_kv_heads: Of a position.
        group: Query heads that share a KV head.
        block_size: Positions.
        has_window: Positions may be too far back to be seen.
        has_cap: Scores are capped.
        heads: Of a group, those that a program has: a power of two.
        rows: Queries times heads of a program.
        tile: Positions read together.
        num_stages: Of the pipeline that reads them.
    """

    keys: Head
    values: Head
    is_shared: bool
    num_kv_heads: int
    group: int
    block_size: int
    has_window: bool
    has_cap: bool
    heads: int = 1
    rows: int = 16
    tile: int = 16
    num_stages: int = 1

    @property
    def parts(self) -> int:
        """Programs among which a group is shared out."""
        return -(-self.group // self.heads)

    @property
    def queries(self) -> int:
        """Of a program."""
        return self.rows // self.heads

    @property
    def is_read_once(self) -> bool:
        """The parts of a value are parts of the key, which has been read."""
        is_like = self.values.main == self.keys.main and self.values.rest in (0, self.keys.rest)
        return self.is_shared and is_like


def sizes(keys: Tensor, values: Tensor, num_heads: int, has_window: bool, has_cap: bool) -> Sizes:
    """Of a layer; those of the programs are for the caller to replace.

    Args:
        keys: [B, K, P, D].
        values: [B, K, P, W], maybe parts of the keys.
        num_heads: Of the queries.
        has_window: See `Sizes`.
        has_cap: Likewise.
    """
    (_, num_kv_heads, block_size, dim), value_dim = keys.shape, values.shape[3]
    is_shared = values.data_ptr() == keys.data_ptr()
    key, value = Head.of(dim, dim), Head.of(value_dim, dim if is_shared else value_dim)
    group = num_heads // num_kv_heads
    return Sizes(key, value, is_shared, num_kv_heads, group, block_size, has_window, has_cap)


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

    @property
    def sizes(self) -> Sizes:
        """With blocks of 64 positions."""
        stride = self.dim if self.is_shared else self.value_dim
        heads = Head.of(self.dim, self.dim), Head.of(self.value_dim, stride)
        counts = self.num_kv_heads, self.group, 64
        return Sizes(*heads, self.is_shared, *counts, self.has_window, self.has_cap)

    def arguments(self, pool: str) -> tuple[dict[str, str], dict[str, object]]:
        """Types of what decode and prefill share, and what is absent."""
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
        return signature, dict.fromkeys(absent + ([] if sinks else ["sinks"]))


SHAPES = (
    Shape("qwen3-0.6b", 16, 8, 128, 128),
    Shape("llama-3.1-8b", 32, 8, 128, 128),
    Shape("qwen3-30b-a3b", 32, 4, 128, 128),
    Shape("gpt-oss", 64, 8, 64, 64, has_sinks=True, has_window=True),
    Shape("gemma2-9b", 16, 8, 256, 256, has_cap=True),
    Shape("latent", 128, 1, 576, 512, is_shared=True),
)
POOLS = ("bf16", "u8")  # of keys and values; bytes are those of float8_e4m3fn
