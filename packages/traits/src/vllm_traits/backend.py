"""The one seam of the system: everything an engine needs from a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_traits.batch import EMPTY, Batch, BatchOutput
from vllm_traits.pending import Pending
from vllm_traits.store import BlockStore


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV has one shape and one lifetime.

    Attributes:
        name: "full", "sliding", "latent" or "recurrent".
        layers: The layers that write it.
        num_kv_heads: On this rank.
        key_dim: Width of a key head.
        value_dim: Width of a value head; 0 if values are read from the keys.
        dtype: Element type, such as "bfloat16".
        bytes_per_block: Of all the layers together, scales included.
        window: Positions a query looks back; 0 is all.
    """

    name: str
    layers: tuple[int, ...]
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    bytes_per_block: int
    window: int = 0


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """Limits and habits of a backend; final when an engine sees it.

    Attributes:
        num_blocks: KV blocks in the pool.
        block_size: Positions per block.
        max_model_len: Longest sequence in tokens, prompt and completion together.
        vocab_size: Width of the logits, which may exceed the tokenizer's vocabulary.
        eos_token_ids: Tokens that end a completion.
        max_sequences: Sequences the backend can hold at once.
        max_batch_tokens: Positions it can compute in one step.
        num_drafts: If positive, it proposes this many drafts after every sample.
        prefix_cacheable: False while some state of a sequence lives outside its blocks.
        kv_groups: Shape of the KV memory.
        fingerprint: Model, weights, dtypes and KV layout: the root of every block key.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()
    max_sequences: int = 256
    max_batch_tokens: int = 8192
    num_drafts: int = 0
    prefix_cacheable: bool = True
    kv_groups: tuple[KVGroup, ...] = ()
    fingerprint: bytes = b""


class InFlight(Pending[BatchOutput], Protocol):
    """A batch that was launched and whose tokens are not known yet."""

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Launch sampling and return at once; called exactly once, before `result`.

        Args:
            masks: For each sequence whose chunk is `masked`: its allowed tokens, one bit per id,
                least significant bit first.
        """
        ...


class ModelBackend(Protocol):
    """Runs batches of a model.

    1. Batches execute in call order on one logical stream, so a freed block may be reused by the
       next batch at once.
    2. Block tables only grow. Preemption is `released`, later a fresh `Start`.
    3. The backend keeps the tokens it sampled; the host never sends a decode token.
    4. `Chunk.start` is the host's view with unresolved drafts counted as accepted. After a
       sequence has sampled, the backend's own count is the truth; it is never larger.
    5. Drafts are asked for only after a sample since the last `Start`.
    6. A chunk is never empty, so a full cache hit still computes one position.
    7. A block under `BlockStore.load` or `save` holds a reference until that is done.
    8. `forward` and `sample` never block and never return values. A synchronous backend finishes
       inside `forward` and returns `Done`.
    9. A `seq_id` is never reused for another sequence, and results arrive only through the handle
       of their batch. A preempted sequence starts again under the same id.
    10. A batch has a bounded binary encoding, `vllm_traits.wire`. Nothing is ever unpickled.
    11. If no chunk is `masked`, the backend may sample inside `forward`, and `sample` does nothing.
    12. A token is a function of logits, params, seed and position: random numbers come from a
       counter-based generator without state.
    13. The backend owns shapes (padding, buckets, graphs); the engine knows limits only.
    14. KV memory is described by `BackendInfo.kv_groups`, never assumed.
    15. Warm-up is over before an engine sees the backend.
    16. Ranks replay identical batches in order and decide nothing by their own clock or memory.
    17. A sequence that fails alone is reported in `BatchOutput.failed`; an exception from `result`
       means the whole batch. After one, `released` may name sequences that the backend has
       dropped already or never saw; it ignores them.
    18. A sequence keeps its row until it is `released`; a chunk for a finished sequence may still
       arrive under overlap and its result is discarded.
    """

    @property
    def info(self) -> BackendInfo:
        """Limits; constant."""
        ...

    @property
    def stores(self) -> Sequence[BlockStore]:
        """Other places where blocks may be, nearest first."""
        ...

    def forward(self, batch: Batch) -> InFlight:
        """Launch a batch and return at once.

        Raises:
            BackendError: The batch could not be launched.
        """
        ...

    def close(self) -> None:
        """Give back everything; called once."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A batch that is finished the moment it is launched; enough for a synchronous backend."""

    output: BatchOutput

    def sample(self, masks: Mapping[int, bytes] = EMPTY) -> None:
        """Nothing is left to launch."""

    def done(self) -> bool:
        """Always true."""
        return True

    def result(self) -> BatchOutput:
        """What the batch produced."""
        return self.output
