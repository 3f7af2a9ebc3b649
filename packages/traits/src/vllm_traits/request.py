"""What a user asks for and what comes back, in token ids.

Knows no text: stop strings, chat templates and tokenizers live in the server.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from vllm_traits.grammar import Grammar


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a completion is sampled and when it ends.

    Order of operations on the logits: allowed and forbidden tokens, bias, penalties, temperature,
    top-k, top-p, min-p. Logprobs are those of the model, before any of them.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches it, in (0, 1].
        min_p: Keep tokens at least this fraction as likely as the most likely one.
        presence_penalty: Subtracted once from every token generated before.
        frequency_penalty: Subtracted once per earlier generation of the token.
        repetition_penalty: Divides positive and multiplies negative logits of every token in
            prompt or completion; 1 is off.
        seed: Key of the random numbers; None lets the engine draw one.
        max_tokens: Longest completion; 0 scores the prompt and generates nothing.
        min_tokens: End-of-sequence and stop ids are masked until this many tokens exist.
        stop_token_ids: End the completion, beside the model's own end-of-sequence ids.
        ignore_eos: Do not end at the model's end-of-sequence ids.
        logit_bias: Pairs of token id and value added to its logit.
        allowed_token_ids: If given, nothing else is ever sampled.
        bad_token_ids: Token sequences that are never completed.
        logprobs: Report the sampled token and this many most likely ones; None reports nothing.
        prompt_logprobs: The same for every prompt token but the first.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How the hidden states of a prompt become one vector.

    Attributes:
        pooling: `mean` over all positions, or the hidden state of the `last` or `cls` (first) one.
        normalize: Scale the vector to length 1.
        dimensions: Keep only this many leading components (before normalising); None keeps all.
    """

    pooling: Literal["mean", "last", "cls"] = "mean"
    normalize: bool = True
    dimensions: int | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to run.

    Attributes:
        id: Chosen by the caller, unique among unfinished requests.
        token_ids: The prompt; never empty.
        params: Sampling for a completion, pooling for an embedding.
        priority: Lower runs earlier under the priority policy.
        salt: Mixed into the root of every block key; requests share cached blocks only if equal.
        session_id: Pins the blocks this request leaves behind, for the next request of the session.
        adapter: Name of a LoRA adapter.
        grammar: Restricts the completion; advanced by the engine as tokens are confirmed.
    """

    id: str
    token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams = field(default_factory=SamplingParams)
    priority: int = 0
    salt: bytes = b""
    session_id: str | None = None
    adapter: str | None = None
    grammar: Grammar | None = None


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position.

    Attributes:
        token_id: The token that stands there.
        logprob: Its natural log-probability.
        rank: 1 for the most likely token of the vocabulary.
        top: The most likely tokens with their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class RequestOutput(NamedTuple):
    """News of one request since its previous output; the last one has a finish reason.

    Attributes:
        request_id: The request's id.
        token_ids: New tokens, the end-of-sequence or stop token included.
        finish_reason: Set on the last output of a request and on no other.
        stop_token_id: The stop token (not end-of-sequence) that ended it, if one did.
        num_cached_tokens: Prompt tokens that were found in the prefix cache.
        logprobs: One entry per new token, if asked for.
        prompt_logprobs: With the first output; one entry per prompt token, None for the first.
        embedding: The vector of a pooling request.
        error: Code of what went wrong, with finish reason `error`.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    embedding: tuple[float, ...] = ()
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.finish_reason is not None
