"""One choice of an answer as it grows: text, log-probabilities, token counts, usage of all.

The same steps serve streamed and plain answers, so both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_traits import RequestOutput, TokenLogprobs

from vllm_server.openai.prompts import Encoded
from vllm_server.openai.schema import ChatRequest, CompletionRequest
from vllm_server.service import Service
from vllm_server.text.answer import Answer
from vllm_server.text.reasoning import CLOSE, OPEN, Parts, ReasoningReader, writes_reasoning
from vllm_server.text.stops import StopFinder
from vllm_server.text.tokenizer import Tokenizer


class Delta(NamedTuple):
    """News of a choice.

    Attributes:
        parts: New text.
        token_ids: New tokens.
        logprobs: Of those of them that are shown.
        prompt_logprobs: Of the prompt, with the first news.
        is_final: Whether the choice has ended.
    """

    parts: Parts
    token_ids: tuple[int, ...]
    logprobs: Sequence[TokenLogprobs]
    prompt_logprobs: Sequence[TokenLogprobs | None]
    is_final: bool


class Choice:
    """One choice.

    Args:
        answer: Turns tokens into text.
        num_prompt_tokens: Of its prompt.
        hides_reasoning: Drop the log-probabilities of reasoning.

    Attributes:
        answer: As given.
        num_prompt_tokens: As given.
        num_cached_tokens: Prompt tokens found in the prefix cache.
    """

    def __init__(
        self, answer: Answer, num_prompt_tokens: int, hides_reasoning: bool = False
    ) -> None:
        self.answer = answer
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self._hides_reasoning = hides_reasoning

    def take(self, output: RequestOutput) -> Delta:
        """Take the engine's news."""
        answer = self.answer
        before = answer.num_tokens
        parts = answer.feed(output)
        taken = answer.num_tokens - before
        self.num_cached_tokens = output.num_cached_tokens
        hidden = max(0, answer.num_hidden_tokens - before) if self._hides_reasoning else 0
        if self._hides_reasoning:
            parts = Parts(content=parts.content)
        return Delta(
            parts,
            output.token_ids[:taken],
            output.logprobs[hidden:taken],
            output.prompt_logprobs,
            answer.finish_reason is not None,
        )

    @property
    def finish_reason(self) -> str | None:
        """`stop` or `length`, once it has ended."""
        reason = self.answer.finish_reason
        return None if reason is None else reason.value


def reads_reasoning(tokenizer: Tokenizer) -> bool:
    """Whether the model writes reasoning that is to be split off."""
    template = tokenizer.chat_template
    if template is not None and writes_reasoning(template.source):
        return True
    return tokenizer.token_id(OPEN) is not None and tokenizer.token_id(CLOSE) is not None


def chat_choice(request: ChatRequest, service: Service, prompt: Encoded) -> Choice:
    """An empty choice of a chat answer."""
    tokenizer = service.tokenizer
    splits = request.separate_reasoning and reads_reasoning(tokenizer)
    reader = ReasoningReader(prompt.is_thinking) if splits else None
    hides = splits and not request.include_reasoning
    return Choice(_answer(request, tokenizer, prompt, reader), len(prompt.ids), hides)


def completion_choice(request: CompletionRequest, service: Service, prompt: Encoded) -> Choice:
    """An empty choice of a completion."""
    return Choice(_answer(request, service.tokenizer, prompt, None), len(prompt.ids))


def _answer(
    request: ChatRequest | CompletionRequest,
    tokenizer: Tokenizer,
    prompt: Encoded,
    reader: ReasoningReader | None,
) -> Answer:
    kept = frozenset(i for i in map(tokenizer.token_id, (OPEN, CLOSE)) if i is not None)
    return Answer(
        tokenizer.detokenizer(
            prompt.ids, request.skip_special_tokens, kept if reader is not None else frozenset()
        ),
        StopFinder(request.stop, request.include_stop_str_in_output),
        reader,
        request.min_tokens,
        request.include_stop_str_in_output,
    )


@dataclass
class Usage:
    """Token counts of an answer.

    Attributes:
        num_prompt_tokens: Of all prompts, each counted once.
        num_completion_tokens: Of all choices.
        num_cached_tokens: Prompt tokens found in the prefix cache, for the first choices.
        num_reasoning_tokens: Completion tokens that were reasoning.
    """

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int

    def body(self) -> dict[str, Any]:
        """The object of the API."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
        }


def usage_of(choices: Sequence[Choice], n: int) -> Usage:
    """Usage of the choices, `n` for each prompt."""
    firsts = choices[::n]
    return Usage(
        sum(c.num_prompt_tokens for c in firsts),
        sum(c.answer.num_tokens for c in choices),
        sum(c.num_cached_tokens for c in firsts),
        sum(c.answer.num_reasoning_tokens for c in choices),
    )
