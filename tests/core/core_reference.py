"""What an engine has to answer: each completion by a plain loop over a model of 64 tokens."""

from __future__ import annotations

from vllm_core.testing import next_token
from vllm_core.testing.sim import constrain
from vllm_traits import Request, SamplingParams

VOCAB_SIZE = 64
MAX_MODEL_LEN = 72
EOS = 50


class ParityGrammar:
    """Allows even and odd tokens in turn; raises at a given token, if told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self._accepted = 0
        self._fails_at = fails_at

    def mask(self) -> bytes:
        return parity_mask(self._accepted)

    def accept(self, token_id: int) -> None:
        assert token_id % 2 == self._accepted % 2, "a token that the mask forbids"
        if self._accepted == self._fails_at:
            raise ValueError("a grammar of no use")
        self._accepted += 1


def parity_mask(turn: int) -> bytes:
    """Bit i is set for tokens 2 to 63 of the parity of `turn`."""
    bits = sum(1 << token for token in range(2, VOCAB_SIZE) if token % 2 == turn % 2)
    return bits.to_bytes(VOCAB_SIZE // 8, "little")


def reference(request: Request, num_positions: int) -> tuple[int, ...]:
    """The completion as a plain loop: no blocks, no batches, no cache, no drafts."""
    context, params = list(request.token_ids), request.params
    assert isinstance(params, SamplingParams) and params.seed is not None
    room = min(params.max_tokens, min(MAX_MODEL_LEN, num_positions + 1) - len(context))
    stops = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | {EOS}
    for place in range(room):
        token = next_token(context, params.seed)
        while place < params.min_tokens and (token == EOS or token in params.stop_token_ids):
            token = token % 50 + 1
        if request.grammar is not None:
            token = constrain(token, parity_mask(place))
        context.append(token)
        if token in stops and place >= params.min_tokens:
            break
    return tuple(context[len(request.token_ids) :])
