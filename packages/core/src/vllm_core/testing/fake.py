"""A backend that answers with prepared tokens: for tests of whatever stands above the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

from vllm_traits import (
    BackendInfo,
    Batch,
    BatchOutput,
    BlockStore,
    Chunk,
    PoolingParams,
    SamplingParams,
    Start,
    TokenLogprobs,
)

from vllm_core.testing.in_flight import SampledOnce

Reply = Callable[[tuple[int, ...]], tuple[int, ...]]  # prompt -> completion

INFO = BackendInfo(
    num_blocks=4096,
    block_size=16,
    max_model_len=4096,
    vocab_size=1024,
    eos_token_ids=frozenset({0}),
)


def echo(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The prompt again."""
    return prompt


@dataclass(slots=True)
class _Row:
    start: Start
    script: tuple[int, ...]
    num_said: int  # tokens of the completion so far


class FakeBackend:
    """Completes every prompt with `reply(prompt)` and then its first end-of-sequence id.

    Beyond the script, or where a mask or `allowed_token_ids` forbids what it says, it takes the
    first token that is allowed. End-of-sequence ids are not said before `min_tokens`. Each token
    has log-probability -0.5 and rank 1; a vector counts the prompt's tokens.

    Args:
        reply: Completion of a prompt.
        info: Limits it declares.
        step_seconds: How long a step takes; slept in `result`, as if a device computed.
        stores: Offered to the engine as they are.

    Attributes:
        batches: Every batch so far, if `record` is set.
    """

    def __init__(
        self,
        reply: Reply = echo,
        info: BackendInfo = INFO,
        *,
        step_seconds: float = 0.0,
        stores: tuple[BlockStore, ...] = (),
        record: bool = False,
    ) -> None:
        self.info = info
        self.stores = stores
        self.step_seconds = step_seconds
        self.batches: list[Batch] = []
        self.is_closed = False
        self._record = record
        self._reply = reply
        self._rows: dict[int, _Row] = {}

    def forward(self, batch: Batch) -> SampledOnce:
        """Apply released, starts and chunks in this order."""
        if self._record:
            self.batches.append(batch)
        for seq_id in batch.released:
            self._rows.pop(seq_id, None)
        for start in batch.starts:
            num_said = len(start.token_ids) - start.num_prompt_tokens
            script = self._reply(start.token_ids[: start.num_prompt_tokens])
            self._rows[start.seq_id] = _Row(start, script, num_said)
        return SampledOnce(partial(self.answer, batch), self.step_seconds)

    def close(self) -> None:
        """Drop every row."""
        self._rows.clear()
        self.is_closed = True

    def answer(self, batch: Batch, masks: Mapping[int, bytes]) -> BatchOutput:
        """What a batch produces; rows move on by what they said.

        Args:
            batch: The batch.
            masks: Allowed tokens of masked sequences.
        """
        token_ids: dict[int, tuple[int, ...]] = {}
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        embeddings: dict[int, tuple[float, ...]] = {}
        for chunk in batch.chunks:
            row = self._rows[chunk.seq_id]
            params = row.start.params
            if isinstance(params, PoolingParams):
                if chunk.sample:
                    embeddings[chunk.seq_id] = self._vector(row.start, params)
                continue
            if params.prompt_logprobs is not None:
                prompt_logprobs[chunk.seq_id] = self._score(row.start, chunk, params)
            if chunk.sample:
                said = self._say(row, chunk, params, masks.get(chunk.seq_id))
                token_ids[chunk.seq_id] = said
                if params.logprobs is not None:
                    logprobs[chunk.seq_id] = tuple(self._logprobs(t, params.logprobs) for t in said)
        return BatchOutput(token_ids, logprobs, prompt_logprobs, embeddings)

    def _say(
        self, row: _Row, chunk: Chunk, params: SamplingParams, mask: bytes | None
    ) -> tuple[int, ...]:
        """The next token, and one more for each draft of the host that was right."""
        said: list[int] = []
        for draft in (*chunk.draft_ids, None):
            token = self._token(row, params, mask)
            row.num_said += 1
            said.append(token)
            if token != draft:
                break
        return tuple(said)

    def _token(self, row: _Row, params: SamplingParams, mask: bytes | None) -> int:
        forbidden: frozenset[int] = frozenset()
        if row.num_said < params.min_tokens:
            forbidden = self.info.eos_token_ids | params.stop_token_ids
        wanted = self._scripted(row)
        allowed = params.allowed_token_ids
        others = range(self.info.vocab_size) if allowed is None else allowed
        for token in chain((wanted,), others):
            in_mask = mask is None or (mask[token >> 3] >> (token & 7)) & 1
            if in_mask and token not in forbidden and (allowed is None or token in allowed):
                return token
        return wanted

    def _scripted(self, row: _Row) -> int:
        if row.num_said < len(row.script):
            return row.script[row.num_said]
        return min(self.info.eos_token_ids, default=0)

    def _score(
        self, start: Start, chunk: Chunk, params: SamplingParams
    ) -> tuple[TokenLogprobs, ...]:
        """One entry for each computed position that a prompt token follows."""
        end = min(chunk.start + chunk.num_tokens + 1, start.num_prompt_tokens)
        following = start.token_ids[chunk.start + 1 : end]
        return tuple(self._logprobs(token, params.prompt_logprobs or 0) for token in following)

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        others = ((token + rank) % self.info.vocab_size for rank in range(num_top))
        top = tuple((other, -0.5 - rank) for rank, other in enumerate(others))
        return TokenLogprobs(token, -0.5, 1, top)

    @staticmethod
    def _vector(start: Start, params: PoolingParams) -> tuple[float, ...]:
        """How often each residue modulo 8 occurs, of length 1 if asked for."""
        counts = [0.0] * 8
        for token in start.token_ids:
            counts[token % 8] += 1.0
        counts = counts[: params.dimensions]
        norm = sum(each * each for each in counts) ** 0.5 if params.normalize else 1.0
        return tuple(each / (norm or 1.0) for each in counts)
