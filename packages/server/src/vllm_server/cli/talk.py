"""Who answers in a chat: the shape of it, and a model in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_traits import BackendError

from vllm_server.local import LocalEngine, sampling_params

Messages = Sequence[Mapping[str, str]]


@dataclass(slots=True)
class Turn:
    """Figures of the last answer.

    Attributes:
        tokens_left: Room in the context.
        cached_tokens: Prompt tokens that did not have to be computed.
        rate: Tokens per second of the answer.
    """

    tokens_left: int = 0
    cached_tokens: int = 0
    rate: float = 0.0


class Talker(Protocol):
    """Answers conversations."""

    turn: Turn

    def answer(self, messages: Messages) -> Iterator[str]:
        """The answer in pieces; leaving early stops it."""
        ...


class LocalTalker:
    """Answers with a model in this process."""

    def __init__(self, engine: LocalEngine, session: str, max_tokens: int | None) -> None:
        self.turn = Turn(tokens_left=engine.max_model_len)
        self._engine = engine
        self._session = session
        self._max_tokens = max_tokens

    def answer(self, messages: Messages) -> Iterator[str]:
        engine = self._engine
        token_ids = engine.encode(engine.tokenizer.apply_chat_template(messages))
        engine.check(token_ids)
        room = engine.max_model_len - len(token_ids)
        params = sampling_params(engine.defaults, room, self._max_tokens)
        stream = engine.submit(token_ids, params, session_id=self._session)
        account = stream.account
        try:
            for piece in stream:
                yield piece.text
        finally:
            stream.cancel()
            seconds = account.ended - account.first_token
            self.turn = Turn(
                tokens_left=room - account.num_tokens,
                cached_tokens=account.num_cached_tokens,
                rate=(account.num_tokens - 1) / seconds if seconds > 0 else 0.0,
            )
        if account.error:
            raise BackendError(f"The answer failed: {account.error}")
