"""From request fields to `SamplingParams`: defaults, limits of the model, contradictions.

Knows token ids and numbers; prompts are made in `vllm_server.openai.prompts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from vllm_traits import SamplingParams

from vllm_server.config.schema import SamplingSettings, Settings
from vllm_server.openai.errors import ApiError, invalid, model_not_found, too_long
from vllm_server.openai.schema import ChatRequest, CompletionRequest, Generation
from vllm_server.service import ModelCard, Service
from vllm_server.text.tokenizer import Tokenizer

GREEDY_BELOW = 1e-5
DEFAULT_CHAT_TOKENS = 4096
DEFAULT_COMPLETION_TOKENS = 16


def check_model(name: str | None, card: ModelCard) -> str:
    """The name a response carries: the one asked for.

    Raises:
        ApiError: 404 `model_not_found`.
    """
    if name is None:
        return card.id
    if name not in card.names:
        raise model_not_found(name, card.names)
    return name


def check_stream(request: Generation) -> None:
    """Streaming options that contradict each other.

    Raises:
        ApiError: 400.
    """
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("`stream_options` needs `stream: true`.", "stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise invalid(
            "`continuous_usage_stats` needs `include_usage`.",
            "stream_options.continuous_usage_stats",
        )
    if request.stream and request.prompt_logprobs:
        raise invalid("`prompt_logprobs` cannot be streamed.", "prompt_logprobs")


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Token ids must be in the vocabulary of the logits.

    Raises:
        ApiError: 400.
    """
    for token_id in (min(ids), max(ids)) if ids else ():
        if not 0 <= token_id < vocab_size:
            raise invalid(
                f"Token id {token_id} is outside of the vocabulary of {vocab_size} tokens.", param
            )


def num_logprobs(request: ChatRequest | CompletionRequest, limit: int) -> int | None:
    """How many most likely tokens to report beside the sampled one; None reports nothing.

    Raises:
        ApiError: 400.
    """
    if isinstance(request, CompletionRequest):
        return _at_most(request.logprobs, limit, "logprobs")
    top = _at_most(request.top_logprobs, limit, "top_logprobs")
    if top is not None and not request.logprobs:
        raise invalid("`top_logprobs` needs `logprobs: true`.", "top_logprobs")
    return (top or 0) if request.logprobs else None


def _at_most(value: int | None, limit: int, param: str) -> int | None:
    if value is not None and value > limit:
        raise invalid(f"`{param}` is {value}, more than this server's {limit}.", param)
    return value


def max_new_tokens(
    request: Generation, num_prompt: int, card: ModelCard, ceiling: int | None
) -> int:
    """Longest completion of a prompt: what was asked for, cut to the room there is.

    Args:
        request: The request.
        num_prompt: Prompt tokens.
        card: Of the model.
        ceiling: The operator's limit.

    Raises:
        ApiError: 400, also if no room is left.
    """
    is_chat = isinstance(request, ChatRequest)
    named = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(request, named)
    if asked is not None and asked > card.max_model_len:
        raise invalid(
            f"`{named}` is {asked}, more than the {card.max_model_len} tokens of the model.", named
        )
    if asked == 0:
        if isinstance(request, CompletionRequest) and request.echo:
            return 0
        raise invalid(f"`{named}` must be at least 1.", named)
    room = card.max_model_len - num_prompt
    if room < 1:
        raise too_long(num_prompt, card.max_model_len, "messages" if is_chat else "prompt")
    default = DEFAULT_CHAT_TOKENS if is_chat else DEFAULT_COMPLETION_TOKENS
    wanted = min(asked if asked is not None else default, room)
    if request.min_tokens > wanted:
        raise invalid(
            f"`min_tokens` is {request.min_tokens}, more than the {wanted} tokens allowed.",
            "min_tokens",
        )
    return min(wanted, ceiling) if ceiling is not None else wanted


def sampling_params(
    request: ChatRequest | CompletionRequest, service: Service, settings: Settings
) -> SamplingParams:
    """Everything but the length, which depends on the prompt.

    Raises:
        ApiError: 400.
    """
    vocab_size = service.card.vocab_size
    check_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids([i for i, _ in request.logit_bias], vocab_size, "logit_bias")
    check_ids(request.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    limit = settings.server.max_logprobs
    logprobs = num_logprobs(request, limit)
    prompt_logprobs = _at_most(request.prompt_logprobs, limit, "prompt_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    chosen = _chosen(request, service.defaults)
    temperature = chosen["temperature"]
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(0, int(chosen["top_k"])),
        top_p=chosen["top_p"],
        min_p=chosen["min_p"],
        presence_penalty=chosen["presence_penalty"],
        frequency_penalty=chosen["frequency_penalty"],
        repetition_penalty=chosen["repetition_penalty"],
        seed=request.seed if request.seed is not None else service.defaults.seed,
        min_tokens=request.min_tokens,
        stop_token_ids=frozenset(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        logit_bias=tuple(dict(request.logit_bias).items()),
        allowed_token_ids=request.allowed_token_ids,
        bad_token_ids=_bad_ids(request.bad_words, service.tokenizer),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


_NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}


def _chosen(request: Generation, defaults: SamplingSettings) -> dict[str, float]:
    """The request's value, else the server's, else the neutral one."""
    found: dict[str, float] = {}
    for name, neutral in _NEUTRAL.items():
        given: float | None = getattr(request, name)
        default: float | None = getattr(defaults, name)
        found[name] = next(v for v in (given, default, neutral) if v is not None)
    return found


def _bad_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written at the start of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for form in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(form, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def choice_seed(seed: int | None, choice: int) -> int | None:
    """Seed of one of several choices; the first one equals a request for a single choice."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def check_priority(value: int | None, header: bytes | None) -> int:
    """The priority of a request, from its body or its header.

    Raises:
        ApiError: 400.
    """
    if value is not None:
        return value
    if header is None:
        return 0
    try:
        found = int(header.decode("ascii"))
    except ValueError:
        raise ApiError(400, "invalid_value", "The header X-Priority must be a number.") from None
    if not -(2**31) <= found < 2**31:
        raise ApiError(400, "invalid_value", "The header X-Priority is out of range.")
    return found
