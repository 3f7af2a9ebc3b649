"""What a caller says about one answer: `SamplingParams` and `Message`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import vllm_traits
from vllm_server.config import SamplingSettings
from vllm_server.config.fields import Field, all_fields
from vllm_server.config.values import convert
from vllm_server.local import TextRules
from vllm_traits import InvalidRequestError

from vllm_lite.names import refuse_unknown


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: Its text.
    """

    role: str
    content: str


@dataclass
class SamplingParams:
    """How one answer is sampled, when it ends, and which session it belongs to.

    None means the model's or engine's default. A field that this version cannot honour is refused
    when the answer is asked for, never ignored.

    Attributes:
        temperature: 0 is greedy.
        top_k: Keep the k most likely tokens; 0 or -1 keeps all.
        top_p: Keep the smallest set of tokens whose probability reaches it.
        min_p: Keep tokens at least this fraction as likely as the most likely one.
        max_tokens: Longest answer.
        min_tokens: No end before this many tokens.
        ignore_eos: Do not end at the model's end-of-sequence tokens.
        presence_penalty: Subtracted once from every token generated before.
        frequency_penalty: Subtracted per earlier generation of the token.
        repetition_penalty: Divides the likelihood of every token seen before; 1 is off.
        seed: The same seed gives the same answer.
        stop: Text, or texts, that end the answer and are not part of it.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Keep the stop text at the end of the answer.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Report the sampled token and this many most likely ones.
        prompt_logprobs: The same for the prompt.
        logit_bias: Added to the logit of a token, by id.
        allowed_token_ids: If given, nothing else is sampled.
        n: Answers per prompt; repeat the prompt to get several.
        session_id: Keeps the conversation's blocks for its next turn.
        response_format: `{"type": "text"}`; other formats are not available in this version.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    n: int = 1
    session_id: str | None = None
    response_format: Mapping[str, Any] | None = None

    def __new__(cls, *args: object, **given: object) -> SamplingParams:
        """Refuse fields that do not exist."""
        refuse_unknown(cls, given, (f.name for f in dataclasses.fields(cls)))
        return super().__new__(cls)

    def text_rules(self) -> TextRules:
        """The part that is about text.

        Raises:
            InvalidRequestError: A stop text is empty.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(stop, str) and stop for stop in stops):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError("stop must be text that is not empty.", param="stop")
        return TextRules(stops, self.include_stop_str_in_output, self.skip_special_tokens)

    def sampling(self, defaults: SamplingSettings, room: int) -> vllm_traits.SamplingParams:
        """The part that the engine takes, with defaults filled in.

        Args:
            defaults: For fields that are None.
            room: Tokens that fit after the prompt.

        Raises:
            InvalidRequestError: A value is out of range or asks for what this version cannot do.
        """
        self._refuse_what_is_not_there()
        chosen = {f.key: self._ranged(f, defaults) for f in _sampling_fields()}
        neutral = vllm_traits.SamplingParams()
        values: dict[str, Any] = {
            k: getattr(neutral, k) if v is None else v for k, v in chosen.items()
        }
        values["top_k"] = max(0, values["top_k"])
        max_tokens = self._counted("max_tokens", 1) or 4096
        return vllm_traits.SamplingParams(
            **values,
            max_tokens=min(max_tokens, room),
            min_tokens=min(self._counted("min_tokens", 0) or 0, room),
            ignore_eos=self.ignore_eos,
            stop_token_ids=frozenset(self.stop_token_ids),
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=self._allowed(),
            logprobs=self._counted("logprobs", 0),
            prompt_logprobs=self._counted("prompt_logprobs", 0),
        )

    def _refuse_what_is_not_there(self) -> None:
        if self.n != 1:
            raise InvalidRequestError(
                f"n is {self.n}, but must be 1; repeat the prompt to get several answers.",
                param="n",
            )
        if self.response_format not in (None, {"type": "text"}):
            raise InvalidRequestError(
                "response_format other than text is not available in this version.",
                param="response_format",
            )

    def _ranged(self, field: Field, defaults: SamplingSettings) -> Any:
        value = getattr(self, field.key)
        if value is None:
            return getattr(defaults, field.key)
        try:
            return convert(field, value)
        except ValueError as error:
            raise InvalidRequestError(
                f"{field.key} is {value!r}, but {error}.", param=field.key
            ) from None

    def _counted(self, name: str, low: int) -> int | None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or value < low):
            raise InvalidRequestError(
                f"{name} is {value!r}, but must be a whole number of at least {low}.", param=name
            )
        return value

    def _allowed(self) -> tuple[int, ...] | None:
        if self.allowed_token_ids is None:
            return None
        if not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids is empty.", param="allowed_token_ids")
        return tuple(self.allowed_token_ids)


def _sampling_fields() -> list[Field]:
    return [field for field in all_fields() if field.section == "sampling"]
