"""Sampling and pooling parameters, as they stand inside a start."""

from __future__ import annotations

from struct import Struct
from typing import Literal

from vllm_traits.errors import WireError
from vllm_traits.request import PoolingParams, SamplingParams
from vllm_traits.wire.reader import BYTE, Reader
from vllm_traits.wire.writer import Writer

SAMPLING, POOLING = 1, 2
POOLINGS: tuple[Literal["mean", "last", "cls"], ...] = ("mean", "last", "cls")
LONG = Struct("<q")

# temperature, top_p, min_p, three penalties; top_k, max_tokens, min_tokens
FIXED = Struct("<6d3q")


def write_params(writer: Writer, params: SamplingParams | PoolingParams) -> None:
    """A byte that says which kind, then its fields."""
    if isinstance(params, PoolingParams):
        writer.pack(BYTE, POOLING)
        writer.pack(BYTE, POOLINGS.index(params.pooling))
        writer.flags(params.normalize)
        write_optional(writer, params.dimensions)
    else:
        writer.pack(BYTE, SAMPLING)
        _write_sampling(writer, params)


def read_params(reader: Reader) -> SamplingParams | PoolingParams:
    """What `write_params` wrote."""
    (kind,) = reader.unpack(BYTE)
    if kind == SAMPLING:
        return _read_sampling(reader)
    if kind != POOLING:
        raise WireError(f"Parameters of kind {kind} are not known.")
    pooling: int = reader.unpack(BYTE)[0]
    if pooling >= len(POOLINGS):
        raise WireError(f"Pooling {pooling} is not known.")
    (normalize,) = reader.flags(1)
    return PoolingParams(POOLINGS[pooling], normalize, read_optional(reader))


def write_optional(writer: Writer, value: int | None) -> None:
    """A flag, and the number if there is one."""
    writer.flags(value is not None)
    if value is not None:
        writer.pack(LONG, value)


def read_optional(reader: Reader) -> int | None:
    """What `write_optional` wrote."""
    (given,) = reader.flags(1)
    return reader.unpack(LONG)[0] if given else None


def _write_sampling(writer: Writer, params: SamplingParams) -> None:
    writer.pack(
        FIXED,
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        params.top_k,
        params.max_tokens,
        params.min_tokens,
    )
    writer.flags(params.ignore_eos, params.allowed_token_ids is not None)
    for value in (params.seed, params.logprobs, params.prompt_logprobs):
        write_optional(writer, value)
    writer.ints(sorted(params.stop_token_ids))
    writer.pairs(params.logit_bias)
    writer.ints(params.allowed_token_ids or ())
    writer.count(len(params.bad_token_ids))
    for token_ids in params.bad_token_ids:
        writer.ints(token_ids)


def _read_sampling(reader: Reader) -> SamplingParams:
    fixed = reader.unpack(FIXED)
    temperature, top_p, min_p, presence, frequency, repetition, top_k, longest, least = fixed
    ignore_eos, allows = reader.flags(2)
    seed, logprobs, prompt_logprobs = (read_optional(reader) for _ in range(3))
    stop_token_ids = frozenset(reader.ints())
    logit_bias, allowed = reader.pairs(), reader.ints()
    if allowed and not allows:
        raise WireError("Allowed tokens are listed and said to be absent.")
    bad = tuple(reader.ints() for _ in range(reader.count(4)))
    return SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        seed=seed,
        max_tokens=longest,
        min_tokens=least,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logit_bias=logit_bias,
        allowed_token_ids=allowed if allows else None,
        bad_token_ids=bad,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
