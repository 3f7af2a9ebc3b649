"""KV blocks in host memory: what the pool had to give up, and a later prompt begins with again.

Copies run on a stream of their own beside the steps. A place in host memory is written in the order
of that stream, so it can be given to another block while a copy out of it is still under way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from vllm_traits import Pending

from vllm_models.native.packed import zeros_of
from vllm_models.runner.kv import KVPool


class Copy:
    """Blocks on their way, on one side or the other.

    Args:
        num_blocks: How many.
        over: Recorded behind the copy; None if it is over already.
    """

    def __init__(self, num_blocks: int, over: torch.cuda.Event | None) -> None:
        self._num_blocks = num_blocks
        self._over = over

    def done(self) -> bool:
        """Whether they have arrived."""
        return self._over is None or self._over.query()

    def result(self) -> int:
        """How many, once they have arrived."""
        if self._over is not None:
            self._over.synchronize()
        return self._num_blocks


class HostStore:
    """Implements `vllm_traits.BlockStore`; the block that was not used for longest makes room.

    Args:
        kv: The pool beside it.
        num_blocks: How many it holds.
    """

    def __init__(self, kv: KVPool, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._device = kv.tensors  # [L, B + 1, ...] each
        self._host = [self._memory(tensor) for tensor in self._device]  # [num_blocks, L, ...] each
        self._held: OrderedDict[bytes, int] = OrderedDict()  # key -> place
        self._free = list(reversed(range(num_blocks)))
        self._stream = torch.cuda.Stream(kv.device) if kv.device.type == "cuda" else None

    def _memory(self, tensor: Tensor) -> Tensor:
        """On a machine without a GPU it is memory only once it is written."""
        shape = (self.num_blocks, tensor.shape[0], *tensor.shape[2:])
        if tensor.is_cuda:
            return torch.empty(shape, dtype=tensor.dtype, pin_memory=True)
        return zeros_of(shape, tensor.dtype)

    def lookup(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are held."""
        return next((i for i, key in enumerate(keys) if key not in self._held), len(keys))

    def load(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Pending[int]:
        """Copy stored blocks into the pool."""
        count = self.lookup(keys)
        places = [self._held[key] for key in keys[:count]]
        for key in keys[:count]:
            self._held.move_to_end(key)
        return self._copy(count, lambda: self._bring(places, list(blocks[:count])))

    def save(self, keys: Sequence[bytes], blocks: Sequence[int]) -> Pending[int]:
        """Copy blocks of the pool into the store, as many as it has room for."""
        count = min(len(keys), self.num_blocks)
        new = [
            (k, b) for k, b in zip(keys[:count], blocks[:count], strict=True) if k not in self._held
        ]
        places = [self._place_for(key) for key, _ in new]
        return self._copy(count, lambda: self._keep([block for _, block in new], places))

    def _place_for(self, key: bytes) -> int:
        place = self._free.pop() if self._free else self._held.popitem(last=False)[1]
        self._held[key] = place
        return place

    @torch.inference_mode()
    def _copy(self, num_blocks: int, run: Callable[[], None]) -> Copy:
        """Behind every step that was launched, which may still write these blocks or read them."""
        if self._stream is None:
            run()
            return Copy(num_blocks, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            run()
            over = torch.cuda.Event()
            over.record()
        return Copy(num_blocks, over)

    def _keep(self, blocks: list[int], places: list[int]) -> None:
        for tensor, host in zip(self._device, self._host, strict=True):
            index = torch.tensor(blocks, device=tensor.device)
            found = tensor.index_select(1, index).transpose(0, 1).contiguous()  # [n, L, ...]
            for place, block in zip(places, found, strict=True):
                host[place].copy_(block, non_blocking=True)

    def _bring(self, places: list[int], blocks: list[int]) -> None:
        for tensor, host in zip(self._device, self._host, strict=True):
            index = torch.tensor(blocks, device=tensor.device)
            found = tensor.new_empty((len(places), tensor.shape[0], *tensor.shape[2:]))
            for place, block in zip(places, found, strict=True):
                block.copy_(host[place], non_blocking=True)
            tensor.index_copy_(1, index, found.transpose(0, 1))
