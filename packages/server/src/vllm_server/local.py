"""A model in this process: text in, text out, without HTTP.

For the command line and the Python API. Streams block the thread that reads them; the model runs
on the engine's own thread.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import vllm_core
from vllm_models.options import OnProgress
from vllm_traits import (
    ContextLengthError,
    FinishReason,
    InvalidRequestError,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

from vllm_server.config import SamplingSettings, Settings
from vllm_server.launch import LoadedModel, start_engine, start_loading
from vllm_server.text.stops import StopFinder
from vllm_server.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_NO_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become the text of an answer.

    Attributes:
        stops: Texts that end it.
        include_stop: Keep the text that ended it.
        skip_special_tokens: Leave special tokens out.
    """

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


class Piece(NamedTuple):
    """A token and the text that it completes.

    Attributes:
        token_id: None for the text that was held back until the end.
        text: May be empty.
    """

    token_id: int | None
    text: str


@dataclass(slots=True)
class Account:
    """Figures of one answer, complete when it has ended.

    Attributes:
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: Of these, found in the prefix cache.
        num_tokens: Length of the answer.
        started: Unix time of the request, in seconds.
        first_token: Of the first token; 0 without one.
        ended: Of the last token.
        finish_reason: `stop`, `length`, `abort` or `error`.
        error: Code of what went wrong.
        logprobs: One entry per token, if asked for.
        prompt_logprobs: One entry per prompt token, if asked for.
    """

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_tokens: int = 0
    started: float = field(default_factory=time.time)
    first_token: float = 0.0
    ended: float = 0.0
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class TextStream:
    """One answer, piece by piece; whoever stops reading early calls `cancel`."""

    def __init__(
        self, stream: vllm_core.SyncStream, request: Request, tokenizer: Tokenizer, rules: TextRules
    ) -> None:
        self.account = Account(len(request.token_ids))
        self._stream = stream
        self._text = tokenizer.detokenizer(request.token_ids, rules.skip_special_tokens)
        self._stops = StopFinder(rules.stops, rules.include_stop)

    def cancel(self) -> None:
        """End the request and free its blocks; the stream ends soon."""
        self._stream.abort()

    def __iter__(self) -> Iterator[Piece]:
        """The pieces not read yet."""
        while not self.is_over:
            yield from self.wait()

    @property
    def is_over(self) -> bool:
        """Whether the last piece was read."""
        return self.account.finish_reason is not None

    def wait(self) -> list[Piece]:
        """What has arrived since the last time, after waiting until that is something."""
        return self._read(next(self._stream))

    def poll(self) -> list[Piece]:
        """What has arrived since the last time, perhaps nothing."""
        output = self._stream.mailbox.take()
        return [] if output is None else self._read(output)

    def _read(self, output: RequestOutput) -> list[Piece]:
        self._note(output)
        pieces = list(self._pieces(output))
        if not output.finished:
            return pieces
        if self._stops.found is not None:
            self.account.finish_reason = FinishReason.STOP
            return pieces
        rest = self._stops.feed(self._text.flush()) + self._stops.flush()
        return [*pieces, Piece(None, rest)] if rest else pieces

    def _note(self, output: RequestOutput) -> None:
        account, now = self.account, time.time()
        if output.token_ids and not account.num_tokens:
            account.first_token = now
        if self._stops.found is None:
            account.num_tokens += len(output.token_ids)
            account.logprobs += output.logprobs
            account.ended = now
        account.num_cached_tokens = max(account.num_cached_tokens, output.num_cached_tokens)
        account.prompt_logprobs = account.prompt_logprobs or output.prompt_logprobs
        account.finish_reason = output.finish_reason
        account.error = output.error

    def _pieces(self, output: RequestOutput) -> Iterator[Piece]:
        last = len(output.token_ids) - 1
        for i, token_id in enumerate(output.token_ids):
            if self._stops.found is not None:
                return
            is_stop = i == last and output.stop_token_id is not None
            text = "" if is_stop else self._stops.feed(self._text.feed((token_id,)))
            if self._stops.found is not None:
                self._stream.abort(FinishReason.STOP)
                self.account.num_tokens -= last - i
                del self.account.logprobs[self.account.num_tokens :]
            yield Piece(token_id, text)


class LocalEngine:
    """A loaded model with its engine; a context manager.

    Args:
        model: Owned from now on.
        context_cache: Honour session ids by pinning their blocks.
    """

    def __init__(self, model: LoadedModel, context_cache: bool = False) -> None:
        self.model = replace(model, scheduler=replace(model.scheduler, max_waiting=_NO_LIMIT))
        self._context_cache = context_cache
        self._engine = start_engine(self.model)
        self._ids = itertools.count()
        self._told = False

    @classmethod
    def load(cls, settings: Settings, on_progress: OnProgress) -> LocalEngine:
        """Load what the settings name.

        Raises:
            ModelError: It cannot be loaded.
            DeviceError: The device is missing or too small.
            ConfigError: A setting does not fit the model.
        """
        model = start_loading(settings, on_progress).result()
        model.findings.log()
        return cls(model, settings.engine.context_cache)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every stream and free the model. Idempotent."""
        self._engine.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""
        return self.model.backend.info.max_model_len

    @property
    def defaults(self) -> SamplingSettings:
        """Sampling where the caller is silent."""
        return self.model.sampling

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running requests and sessions hold."""
        return self._engine.snapshot().kv_usage

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a prompt; what a chat template began is not begun twice."""
        bos = self.tokenizer.bos_token
        is_begun = bos is not None and prompt.startswith(bos)
        return tuple(self.tokenizer.encode(prompt, add_special_tokens=not is_begun))

    def check(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that can never be answered.

        Raises:
            InvalidRequestError: It is empty.
            ContextLengthError: It leaves no room.
        """
        if not token_ids:
            raise InvalidRequestError("The prompt is empty; give some text.", param="prompt")
        if len(token_ids) >= self.max_model_len:
            raise ContextLengthError(len(token_ids), self.max_model_len)

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        rules: TextRules | None = None,
        session_id: str | None = None,
    ) -> TextStream:
        """Run a prompt.

        Raises:
            InvalidRequestError: It can never run.
            BackendError: The engine is closed or dead.
        """
        if session_id is not None and not self._context_cache and not self._told:
            self._told = True
            log.info("Sessions are not pinned without context_cache; blocks are reused while kept")
        request = Request(
            f"local-{next(self._ids)}",
            tuple(token_ids),
            params,
            session_id=session_id if self._context_cache else None,
        )
        stream = self._engine.submit(request, max_unread=None)
        return TextStream(stream, request, self.tokenizer, rules or TextRules())


def read_all(streams: Sequence[TextStream]) -> list[str]:
    """The texts of answers that run side by side.

    All are read whenever the first unfinished one has news, so that each account has the times of
    its own tokens and not those of the reader's turns.
    """
    texts: list[list[str]] = [[] for _ in streams]
    unfinished: list[tuple[TextStream, list[str]]] = list(zip(streams, texts, strict=True))
    while unfinished:
        for i, (stream, text) in enumerate(unfinished):
            text += [piece.text for piece in (stream.poll() if i else stream.wait())]
        unfinished = [pair for pair in unfinished if not pair[0].is_over]
    return ["".join(text) for text in texts]


def sampling_params(
    defaults: SamplingSettings, room: int, max_tokens: int | None = None
) -> SamplingParams:
    """Parameters of a request that says nothing but how long its answer may be.

    Args:
        defaults: The operator's or the model's values; None is the neutral one.
        room: Tokens that fit after the prompt.
        max_tokens: At most this many; 4096 if absent.
    """
    names = (
        *("temperature", "top_p", "min_p", "seed"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    )
    given = {name: value for name in names if (value := getattr(defaults, name)) is not None}
    return SamplingParams(
        **given, top_k=max(0, defaults.top_k or 0), max_tokens=max(1, min(max_tokens or 4096, room))
    )
