"""The text of one completion: tokens in, parts of an answer out.

Joins the detokenizer, the stop strings and the reasoning reader, and counts tokens. Knows nothing
of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_traits import FinishReason, RequestOutput

from vllm_server.text.detokenize import Detokenizer
from vllm_server.text.reasoning import Parts, ReasoningReader
from vllm_server.text.stops import StopFinder


class Answer:
    """One completion as it grows.

    Args:
        detokenizer: Text of the tokens.
        stops: Finds stop strings.
        reader: Splits off reasoning; None leaves everything in the content.
        min_tokens: Stop strings within this many first tokens do not count.
        include_stop: Show the stop token that ended the completion.

    Attributes:
        num_tokens: Tokens taken so far, the one that ended it included.
        num_reasoning_tokens: Those that were thinking.
        num_hidden_tokens: First tokens of the completion that a reader without interest in
            reasoning does not see.
        finish_reason: Why it ended, or None.
        stop_reason: The stop string or stop token that ended it, or None.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopFinder,
        reader: ReasoningReader | None = None,
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.num_hidden_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._detokenizer = detokenizer
        self._stops = stops
        self._reader = reader
        self._min_tokens = min_tokens
        self._include_stop = include_stop

    def feed(self, output: RequestOutput) -> Parts:
        """Take the engine's news; tokens after a stop string are not taken.

        Sets `finish_reason` when the answer ends, which may be before the engine's request does.
        """
        ids = output.token_ids
        hidden = output.finish_reason is FinishReason.STOP and not self._include_stop
        shown = ids[:-1] if hidden else ids
        parts = self._feed(shown)
        if self.finish_reason is not None:
            return parts
        self._count(len(ids) - len(shown))
        if output.finish_reason is None:
            return parts
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_token_id
        return _joined(parts, self._flush())

    def _feed(self, ids: Sequence[int]) -> Parts:
        reads_on = self._reader is None or self._reader.is_done
        if reads_on and not self._stops.is_active:
            self._count(len(ids))
            return Parts(content=self._detokenizer.feed(ids))
        parts = Parts()
        for token_id in ids:
            parts = _joined(parts, self._feed_one(token_id))
            if self.finish_reason is not None:
                break
        return parts

    def _feed_one(self, token_id: int) -> Parts:
        text = self._detokenizer.feed((token_id,))
        self._count(1)
        if self.num_tokens > self._min_tokens:
            text = self._stops.feed(text)
        parts = self._split(text)
        if self._stops.found is not None:
            self.finish_reason = FinishReason.STOP
            self.stop_reason = self._stops.found
            parts = _joined(parts, self._reader.flush() if self._reader else Parts())
        return parts

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        if self._reader is not None and self._reader.is_reasoning:
            self.num_reasoning_tokens += num_tokens
            self.num_hidden_tokens = self.num_tokens

    def _split(self, text: str) -> Parts:
        return self._reader.feed(text) if self._reader else Parts(content=text)

    def _flush(self) -> Parts:
        text = self._stops.feed(self._detokenizer.flush())
        if self._stops.found is None:
            text += self._stops.flush()
        elif self.finish_reason is not FinishReason.STOP:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._stops.found
        parts = self._split(text)
        return _joined(parts, self._reader.flush() if self._reader else Parts())


def _joined(first: Parts, second: Parts) -> Parts:
    return Parts(first.reasoning + second.reasoning, first.content + second.content)
