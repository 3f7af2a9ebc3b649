"""Log-probabilities in the shapes of chat, completions and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_traits import TokenLogprobs

from vllm_server.text.tokenizer import Tokenizer

LOWEST = -9999.0


class TokenNames:
    """How tokens are called in an answer.

    Args:
        tokenizer: Knows their bytes.
        as_ids: Call them `token_id:N`.
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def name(self, token_id: int) -> str:
        """The token's text, incomplete characters replaced, or its id."""
        if self._as_ids:
            return f"token_id:{token_id}"
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes."""
        return list(self._tokenizer.token_bytes(token_id))


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LOWEST


def chat_entries(entries: Sequence[TokenLogprobs], names: TokenNames) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat answer."""
    return [
        {
            **_chat_token(entry.token_id, entry.logprob, names),
            "top_logprobs": [_chat_token(i, logprob, names) for i, logprob in entry.top],
        }
        for entry in entries
    ]


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.name(token_id),
        "logprob": finite(logprob),
        "bytes": names.raw(token_id),
    }


class CompletionLogprobs:
    """The parallel lists of a completion's `logprobs`.

    Args:
        names: How tokens are called.
        num_top: Most likely tokens to list.
    """

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names = names
        self._num_top = num_top
        self._offset = 0

    def lists(self, entries: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, list[Any]]:
        """The lists for the next tokens.

        Args:
            entries: Token ids with their log-probabilities; the first token of a prompt has none.
        """
        found: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in entries:
            name = self._names.name(token_id)
            found["tokens"].append(name)
            found["text_offset"].append(self._offset)
            found["token_logprobs"].append(None if entry is None else finite(entry.logprob))
            found["top_logprobs"].append(None if entry is None else self._top(entry))
            self._offset += len(name)
        return found

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        top = {self._names.name(i): finite(p) for i, p in entry.top[: self._num_top]}
        return {**top, self._names.name(entry.token_id): finite(entry.logprob)}


def prompt_entries(
    entries: Sequence[TokenLogprobs | None], names: TokenNames
) -> list[dict[str, Any] | None]:
    """`prompt_logprobs`: for each prompt token but the first, tokens by id."""
    return [None if entry is None else _prompt_entry(entry, names) for entry in entries]


def _prompt_entry(entry: TokenLogprobs, names: TokenNames) -> dict[str, Any]:
    found = {
        str(i): {"logprob": finite(p), "rank": rank, "decoded_token": names.name(i)}
        for rank, (i, p) in enumerate(entry.top, 1)
    }
    found[str(entry.token_id)] = {
        "logprob": finite(entry.logprob),
        "rank": entry.rank,
        "decoded_token": names.name(entry.token_id),
    }
    return found
