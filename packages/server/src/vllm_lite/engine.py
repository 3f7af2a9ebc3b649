"""A model in this process with a text interface: the class `Engine`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_server.local import LocalEngine, TextStream, read_all
from vllm_server.progress import shown_progress
from vllm_traits import BackendError, InvalidRequestError

from vllm_lite.config import EngineConfig
from vllm_lite.outputs import GenerationOutput, GenerationStream
from vllm_lite.params import Message, SamplingParams

log = logging.getLogger(__name__)

Messages = Sequence[Message | Mapping[str, Any]]


class Engine:
    """Loads a model and answers prompts; a context manager.

    Args:
        config: What to load and how; the embedded demonstration model by default.
        dtype: `bf16`, `f16`, `f32` or `auto`; wins over the field of that name.

    Raises:
        ConfigError: A setting cannot work.
        ModelError: The model is not there or cannot be loaded.
        DeviceError: The device is missing or too small.
    """

    def __init__(self, config: EngineConfig | None = None, dtype: str = "auto") -> None:
        settings = (config or EngineConfig()).settings(dtype)
        self._ceiling = settings.engine.max_tokens
        with shown_progress() as on_progress:
            self._local = LocalEngine.load(settings, on_progress)
        self._ids = itertools.count()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every stream and free the model's memory. Idempotent."""
        self._local.close()

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running answers and sessions hold, 0 to 1."""
        return self._local.kv_usage

    def apply_chat_template(
        self,
        messages: Messages | SamplingParams,
        log_prompt: bool | Messages = False,
        log_too: bool = False,
    ) -> str:
        """The prompt of a conversation, by the model's own template.

        Both `(messages, log_prompt)` and `(params, messages, log_prompt)` are accepted.

        Args:
            messages: `Message`s, or mappings with `role` and `content`.
            log_prompt: Log the prompt.
            log_too: Its place in the longer form.

        Raises:
            InvalidRequestError: The model has no template, or it refuses the messages.
        """
        if isinstance(messages, SamplingParams):
            if isinstance(log_prompt, bool):
                raise TypeError("apply_chat_template(params, messages, log_prompt) needs messages")
            messages, log_prompt = log_prompt, log_too
        turns = [m._asdict() if isinstance(m, Message) else dict(m) for m in messages]
        prompt = self._local.tokenizer.apply_chat_template(turns)
        if log_prompt:
            log.info("%s", prompt)
        return prompt

    def generate_sync(
        self,
        params: SamplingParams | Sequence[SamplingParams],
        prompts: str | Sequence[str],
    ) -> list[GenerationOutput]:
        """Answer prompts as one batch, in their order.

        Args:
            params: One for each prompt, or one for all.
            prompts: Texts as the model sees them; `apply_chat_template` makes one of messages.

        Raises:
            InvalidRequestError: A prompt or its params can never work; nothing has run then.
            BackendError: The engine is closed, or an answer failed.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = [params] if isinstance(params, SamplingParams) else list(params)
        if len(each) == 1:
            each *= len(prompts)
        if len(each) != len(prompts):
            raise InvalidRequestError(
                f"There are {len(each)} params for {len(prompts)} prompts.", param="params"
            )
        runs = [self._prepared(*pair) for pair in zip(each, prompts, strict=True)]
        streams = [self._local.submit(*run) for run in runs]
        texts = read_all(streams)
        return [self._output(*pair) for pair in zip(streams, texts, strict=True)]

    def _output(self, stream: TextStream, text: str) -> GenerationOutput:
        seq_id = next(self._ids)
        if stream.account.error:
            raise BackendError(f"Answer {seq_id} failed: {stream.account.error}")
        return GenerationOutput.of(seq_id, stream.account, text)

    def generate_stream(
        self, params: SamplingParams, prompt: str
    ) -> tuple[int, int, GenerationStream]:
        """Begin an answer: its number, the prompt's length in tokens, and the stream of items.

        Raises:
            InvalidRequestError: The prompt or its params can never work.
            BackendError: The engine is closed.
        """
        run = self._prepared(params, prompt)
        stream = self._local.submit(*run)
        return next(self._ids), len(run[0]), GenerationStream(stream)

    def stream(self, params: SamplingParams, prompt: str) -> Iterator[str]:
        """The answer as plain text, piece by piece; leaving the loop cancels it.

        Raises:
            InvalidRequestError: The prompt or its params can never work.
            BackendError: The engine is closed, or the answer failed.
        """
        for item in self.generate_stream(params, prompt)[2]:
            if item.datatype == "ERROR":
                raise BackendError(f"The answer failed: {item.data}")
            if item.datatype == "TOKEN":
                yield str(item)

    def _prepared(self, params: SamplingParams, prompt: str) -> tuple[Any, ...]:
        """Everything `LocalEngine.submit` needs, checked."""
        token_ids = self._local.encode(prompt)
        self._local.check(token_ids)
        room = min(
            self._local.max_model_len - len(token_ids), self._ceiling or self._local.max_model_len
        )
        sampling = params.sampling(self._local.defaults, room)
        return token_ids, sampling, params.text_rules(), params.session_id
