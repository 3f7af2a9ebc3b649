"""The two lines about speed that end a run of several prompts."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_server.local import Account


def summary(accounts: Sequence[Account]) -> str:
    """Tokens, seconds and tokens per second of prompts and of answers.

    Prompts take until the last first token, answers from the first token of all to the end.
    """
    prompt_tokens = sum(a.num_prompt_tokens for a in accounts)
    decoded_tokens = sum(a.num_tokens for a in accounts)
    begun = [a.first_token for a in accounts if a.first_token]
    prompt_seconds = max(begun, default=0.0) - min(a.started for a in accounts) if begun else 0.0
    decode_seconds = max(a.ended for a in accounts) - min(begun) if begun else 0.0
    return "\n".join(
        (
            _line("Prompt tokens: ", prompt_tokens, prompt_seconds),
            _line("Decoded tokens:", decoded_tokens, decode_seconds),
        )
    )


def _line(what: str, tokens: int, seconds: float) -> str:
    rate = tokens / seconds if seconds > 0 else 0.0
    return f"{what} {tokens} in {seconds:.2f} s ({rate:.2f} tokens/s)"
