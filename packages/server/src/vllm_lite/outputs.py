"""What an engine hands back: `GenerationOutput`, and the items of a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm_server.local import Account, TextStream
from vllm_traits import FinishReason, TokenLogprobs

DataType = Literal["TOKEN", "TOKEN_ID", "COMPLETION", "DONE", "ERROR"]


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """One answer and when it was made.

    Attributes:
        seq_id: Number of the request in its engine.
        prompt_length: Tokens of the prompt.
        prompt_start_time: When work on it began, in milliseconds since 1970.
        decode_start_time: When the first token was there.
        decode_finish_time: When the last token was there.
        decoded_length: Tokens of the answer.
        decode_output: Its text.
        finish_reason: `stop`, `length` or `abort`.
        num_cached_tokens: Prompt tokens that did not have to be computed.
        logprobs: One entry per token, if asked for.
        prompt_logprobs: One entry per prompt token, if asked for; None for the first.
    """

    seq_id: int
    prompt_length: int
    prompt_start_time: int
    decode_start_time: int
    decode_finish_time: int
    decoded_length: int
    decode_output: str
    finish_reason: str = "stop"
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = field(default=(), repr=False)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, seq_id: int, account: Account, text: str) -> GenerationOutput:
        """The output of an answer that has ended."""
        return cls(
            seq_id=seq_id,
            prompt_length=account.num_prompt_tokens,
            prompt_start_time=_ms(account.started),
            decode_start_time=_ms(account.first_token or account.ended),
            decode_finish_time=_ms(account.ended),
            decoded_length=account.num_tokens,
            decode_output=text,
            finish_reason=str(account.finish_reason or FinishReason.ABORT),
            num_cached_tokens=account.num_cached_tokens,
            logprobs=tuple(account.logprobs),
            prompt_logprobs=account.prompt_logprobs,
        )


class Done(NamedTuple):
    """Figures at the end of a stream; times in milliseconds since 1970."""

    prompt_start: int
    decode_start: int
    decode_finish: int
    length: int


@dataclass(frozen=True, slots=True)
class StreamItem:
    """One piece of news; `str(item)` is its text, empty for all but tokens.

    Attributes:
        datatype: What `data` is.
        data: Text for TOKEN, COMPLETION and ERROR; an id for TOKEN_ID; `Done` for DONE.
    """

    datatype: DataType
    data: str | int | Done

    def __str__(self) -> str:
        return str(self.data) if self.datatype == "TOKEN" else ""


class GenerationStream:
    """Items of one answer: TOKEN_ID and TOKEN as they come, then COMPLETION and DONE, or ERROR.

    Leaving the loop cancels the request, as `cancel` does.
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._text: list[str] = []

    def cancel(self) -> None:
        """End the request; the stream ends soon."""
        self._stream.cancel()

    def __iter__(self) -> Iterator[StreamItem]:
        try:
            yield from self._items()
        finally:
            self._stream.cancel()

    def _items(self) -> Iterator[StreamItem]:
        for piece in self._stream:
            if piece.token_id is not None:
                yield StreamItem("TOKEN_ID", piece.token_id)
            if piece.text:
                self._text.append(piece.text)
                yield StreamItem("TOKEN", piece.text)
        account = self._stream.account
        if account.error:
            yield StreamItem("ERROR", account.error)
            return
        yield StreamItem("COMPLETION", "".join(self._text))
        done = Done(
            prompt_start=_ms(account.started),
            decode_start=_ms(account.first_token or account.ended),
            decode_finish=_ms(account.ended),
            length=account.num_tokens,
        )
        yield StreamItem("DONE", done)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
