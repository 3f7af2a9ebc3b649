"""What a request must satisfy before it is queued, given all limits."""

from __future__ import annotations

from typing import NamedTuple

from vllm_traits import BackendInfo, ConfigError, ContextLengthError, InvalidRequestError, Request

from vllm_core.config import SchedulerConfig
from vllm_core.scheduler.sequence import sampling_of


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
