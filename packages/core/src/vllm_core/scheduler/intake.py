"""From a request to a sequence: what it must satisfy given all limits, and what is derived once."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import NamedTuple

from vllm_traits import BackendInfo, ConfigError, ContextLengthError, InvalidRequestError, Request

from vllm_core.config import SchedulerConfig
from vllm_core.kv_cache.cache import KVCache
from vllm_core.metrics.stats import RequestTimes
from vllm_core.scheduler.finish import stop_ids
from vllm_core.scheduler.propose import NGramProposer, ProposerFactory
from vllm_core.scheduler.sequence import Sequence, sampling_of


class Limits(NamedTuple):
    """What holds for every step and every sequence.

    Attributes:
        max_batch_tokens: Token budget of a step.
        max_sequences: Rows in use at once.
        num_positions: Positions of the whole pool.
        max_length: Tokens a sequence may ever have.
        watermark: Blocks kept free at admission while others run.
    """

    max_batch_tokens: int
    max_sequences: int
    num_positions: int
    max_length: int
    watermark: int

    @classmethod
    def of(cls, info: BackendInfo, config: SchedulerConfig) -> Limits:
        """The tighter of what the backend can do and what the configuration allows.

        Raises:
            ConfigError: A step could not hold a single block.
        """
        budget = min(config.max_batch_tokens or info.max_batch_tokens, info.max_batch_tokens)
        if budget < info.block_size:
            raise ConfigError(
                f"A step of {budget} tokens cannot hold a block of {info.block_size} positions. "
                f"Set max_batch_tokens to at least {info.block_size}."
            )
        num_positions = info.num_blocks * info.block_size
        return cls(
            max_batch_tokens=budget,
            max_sequences=min(config.max_sequences or info.max_sequences, info.max_sequences),
            num_positions=num_positions,
            max_length=min(info.max_model_len, num_positions + 1),
            watermark=int(info.num_blocks * config.watermark),
        )


class Intake:
    """Makes sequences of requests that can run.

    Args:
        info: Limits of the backend.
        config: Whether the host guesses drafts.
        limits: What holds for every sequence.
        cache: Where a sequence's block table belongs.
        propose: Makes a proposer of drafts for each sequence, in place of the n-gram lookup.

    Attributes:
        max_drafts: Most drafts a chunk may carry.

    Raises:
        ConfigError: Both host and backend would propose drafts.
    """

    def __init__(
        self,
        info: BackendInfo,
        config: SchedulerConfig,
        limits: Limits,
        cache: KVCache,
        propose: ProposerFactory | None,
    ) -> None:
        self._info = info
        self._limits = limits
        self._cache = cache
        self._propose = propose or _ngram_lookup(config.num_ngram_drafts)
        if self._propose is not None and info.num_drafts:
            raise ConfigError(
                f"The backend proposes {info.num_drafts} drafts by itself; drafts of the host "
                "cannot be used beside them. Set num_ngram_drafts to 0."
            )
        self.max_drafts = info.num_drafts or config.num_ngram_drafts or int(propose is not None)
        self._ids = count()
        self._random = Random()

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; reads only what never changes.

        Raises:
            InvalidRequestError: With what is wrong, and both values.
        """
        reject_unfit(request, self._info, self._limits)

    def sequence(self, request: Request, arrived_at: float) -> Sequence:
        """The sequence of a checked request."""
        params = sampling_of(request)
        # Prompt logprobs and vectors need every position computed, so no block may stand for it.
        reuses = params.prompt_logprobs is None and params is request.params
        drafts = request.grammar is None and self.max_drafts > 0
        seq = Sequence(
            id=next(self._ids),
            request=request,
            params=params,
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            max_length=min(len(request.token_ids) + params.max_tokens, self._limits.max_length),
            stop_ids=stop_ids(params, self._info.eos_token_ids),
            table=self._cache.table(request.salt, request.adapter, reuses),
            times=RequestTimes(arrived_at),
            tokens=list(request.token_ids),
            plain=request.grammar is None and params.logprobs is None and not drafts,
        )
        if params.prompt_logprobs is not None:
            seq.expect_prompt_logprobs()
        if drafts and self._propose is not None and seq.generates:
            seq.proposer = self._propose()
        return seq


def _ngram_lookup(num_drafts: int) -> ProposerFactory | None:
    return (lambda: NGramProposer(num_drafts)) if num_drafts else None


def reject_unfit(request: Request, info: BackendInfo, limits: Limits) -> None:
    """Refuse a request that can never run.

    Raises:
        ContextLengthError: The prompt leaves no room for a token it asks for.
        InvalidRequestError: Anything else, with both values.
    """
    params = sampling_of(request)
    num_prompt = len(request.token_ids)
    if num_prompt == 0:
        raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
    if num_prompt + (params.max_tokens > 0) > info.max_model_len:
        raise ContextLengthError(num_prompt, info.max_model_len)
    if num_prompt > limits.num_positions:
        raise InvalidRequestError(
            f"The prompt has {num_prompt} tokens, but the KV cache holds only "
            f"{limits.num_positions} ({info.num_blocks} blocks of {info.block_size}). Shorten the "
            "prompt, or start the engine with more blocks.",
            param="prompt",
        )
    _reject_token_ids("prompt", request.token_ids, info.vocab_size)
    _reject_token_ids("stop_token_ids", tuple(params.stop_token_ids), info.vocab_size)
    if params.max_tokens < 0:
        raise InvalidRequestError(
            f"max_tokens is {params.max_tokens}, but must be at least 0.", param="max_tokens"
        )


def _reject_token_ids(param: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"Token id {token_id} in {param} is outside of the vocabulary of {vocab_size} "
                "tokens.",
                param=param,
            )
