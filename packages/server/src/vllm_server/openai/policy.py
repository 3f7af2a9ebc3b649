"""What happens to parameters that are not fields: refused, without effect, or another name.

The tables are data for the validator and for the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """A known parameter that is refused.

    Attributes:
        reason: Second half of the sentence that begins with the parameter's name.
        neutral: Values that ask for nothing, and pass.
    """

    reason: str
    neutral: tuple[Any, ...] = ()


_LATER = Refusal("is not available in this version.")
_TOOLS = Refusal("is not available: this version has no tool calls.")
_GRAMMAR = Refusal("is not available: this version has no structured output.")
_OTHER_ENGINE = Refusal("belongs to another engine and is never accepted.")
_BEAM = Refusal("has only its neutral value; beam search is not available.")

_SHARED: Mapping[str, Refusal] = {
    "best_of": Refusal(_BEAM.reason, (1,)),
    "use_beam_search": Refusal(_BEAM.reason, (False,)),
    "length_penalty": Refusal(_BEAM.reason, (1,)),
    "tools": _TOOLS,
    "tool_choice": Refusal(_TOOLS.reason, ("none",)),
    "functions": Refusal("is deprecated; this version has no tool calls."),
    "function_call": Refusal("is deprecated; this version has no tool calls.", ("none",)),
    "parallel_tool_calls": Refusal(_TOOLS.reason, (True, False)),
    "response_format": Refusal(_GRAMMAR.reason, ({"type": "text"},)),
    "structured_outputs": _GRAMMAR,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "guided_decoding_backend": _GRAMMAR,
    "guided_whitespace_pattern": _GRAMMAR,
    "regex": _GRAMMAR,
    "ebnf": _GRAMMAR,
    "grammar": _GRAMMAR,
    "json_schema": _GRAMMAR,
    "structural_tag": _GRAMMAR,
    "prompt_embeds": _OTHER_ENGINE,
    "kv_transfer_params": _OTHER_ENGINE,
    "vllm_xargs": _OTHER_ENGINE,
    "mm_processor_kwargs": _OTHER_ENGINE,
    "media_io_kwargs": _OTHER_ENGINE,
    "logits_processors": _OTHER_ENGINE,
    "modalities": Refusal("may only be text.", (["text"],)),
    "web_search_options": Refusal("is not available: the server makes no outbound connection."),
    "audio": Refusal("is not available: only text is generated."),
    "moderation": _LATER,
    "store": Refusal("is not available: nothing is stored.", (False,)),
    "stream_interval": Refusal("has only its neutral value in this version.", (1,)),
    "thinking_token_budget": Refusal("has only its neutral value in this version.", (-1,)),
    "return_timings": Refusal(_LATER.reason, (False,)),
    "spaces_between_special_tokens": Refusal("has only its neutral value.", (True,)),
    "suffix": Refusal("is not available: text is generated at the end only.", ("",)),
    "documents": _LATER,
}

REFUSED: Mapping[str, Mapping[str, Refusal]] = {
    "chat": {
        **_SHARED,
        "echo": Refusal("is a parameter of /v1/completions.", (False,)),
        "chat_template": Refusal("is never taken from a request; the operator sets it."),
    },
    "completions": {
        **_SHARED,
        "messages": Refusal("is a parameter of /v1/chat/completions."),
        "top_logprobs": Refusal("is a parameter of /v1/chat/completions; set `logprobs`."),
        "chat_template": Refusal("is never taken from a request; the operator sets it."),
        "chat_template_kwargs": Refusal("is a parameter of /v1/chat/completions."),
    },
    "embeddings": {
        "prompt_embeds": _OTHER_ENGINE,
        "messages": Refusal("is a parameter of /v1/chat/completions; set `input`."),
        "embedding_types": _LATER,
        "task": _LATER,
    },
    "tokenize": {"chat_template": Refusal("is never taken from a request; the operator sets it.")},
    "detokenize": {},
    "shutdown": {},
}

IDLE = frozenset(
    {
        "user", "safety_identifier", "metadata", "service_tier", "verbosity", "prediction",
        "prompt_cache_retention", "prompt_cache_options",
    }
)  # fmt: skip

ALIASES: Mapping[str, str] = {
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "enable_thinking": "thinking",
}


def refusal_of(route: str, name: str, value: Any) -> str | None:
    """Why a parameter is refused, or None if it is not, or asks for nothing."""
    table = REFUSED[route]
    refusal = table.get(name)
    if refusal is None and name.startswith("mm_"):
        refusal = _OTHER_ENGINE
    if refusal is None or any(_same(value, neutral) for neutral in refusal.neutral):
        return None
    return refusal.reason


def _same(value: Any, neutral: Any) -> bool:
    """Equal, where true is not 1 but 1.0 is."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
