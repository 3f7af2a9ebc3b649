"""From texts, ids and messages to the token ids of prompts.

Refuses what cannot fit before any text work starts, and does that work off the event loop. Knows
no sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm_traits import InvalidRequestError

from vllm_server.openai.errors import ApiError, echo, invalid, too_long, unsupported
from vllm_server.openai.fields import Prompt
from vllm_server.openai.sampling import check_ids
from vllm_server.openai.schema import Conversation, Message, Truncation
from vllm_server.service import ModelCard, ServerState
from vllm_server.text.reasoning import is_opened
from vllm_server.text.tokenizer import Tokenizer

BYTES_PER_TOKEN = 8
TINY_CHARS = 512


@dataclass(frozen=True)
class Encoded:
    """One prompt.

    Attributes:
        ids: Its tokens.
        text: Its text; None for a prompt that was given as ids.
        is_thinking: Whether it ends inside the model's reasoning.
    """

    ids: tuple[int, ...]
    text: str | None = None
    is_thinking: bool = False


async def encode_prompts(
    state: ServerState,
    tokenizer: Tokenizer,
    card: ModelCard,
    prompts: Sequence[Prompt],
    add_special_tokens: bool,
    param: str,
) -> list[Encoded]:
    """Token ids of texts, or of ids that are checked.

    Raises:
        ApiError: 400.
    """
    num_chars = 0
    for prompt in prompts:
        if isinstance(prompt, str):
            check_size([prompt], card, param)
            num_chars += len(prompt)
        else:
            check_ids(prompt, card.vocab_size, param)
    if num_chars <= TINY_CHARS:
        return _encode_all(tokenizer, prompts, add_special_tokens)
    return await state.in_thread(_encode_all, tokenizer, prompts, add_special_tokens)


def _encode_all(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], add_special_tokens: bool
) -> list[Encoded]:
    return [
        Encoded(tuple(tokenizer.encode(p, add_special_tokens)), p)
        if isinstance(p, str)
        else Encoded(p)
        for p in prompts
    ]


def check_size(texts: Sequence[str], card: ModelCard, param: str) -> None:
    """Refuse a text that cannot fit, whatever its tokens are.

    Args:
        texts: Parts of one prompt.
        card: Of the model.
        param: Name of the field that holds the prompt.

    Raises:
        ApiError: 400 `context_length_exceeded`.
    """
    limit = card.max_model_len * BYTES_PER_TOKEN
    size = sum(map(len, texts))
    if size * 4 <= limit:
        return
    if size <= limit:
        size = sum(len(text.encode()) for text in texts)
    if size > limit:
        raise too_long(
            size // BYTES_PER_TOKEN,
            card.max_model_len,
            param,
            f"the prompt has {size} bytes, more than {BYTES_PER_TOKEN} per token",
        )


def truncated(ids: tuple[int, ...], request: Truncation, limit: int) -> tuple[int, ...]:
    """A prompt cut to the asked length.

    Args:
        ids: The prompt.
        request: What was asked for.
        limit: Longest prompt that the model takes.

    Raises:
        ApiError: 400 if more than the limit is asked for.
    """
    asked = request.truncate_prompt_tokens
    if asked is None:
        return ids
    if asked > limit or asked == 0:
        raise invalid(
            f"`truncate_prompt_tokens` is {asked}, but must be -1 or 1 to {limit}.",
            "truncate_prompt_tokens",
        )
    length = limit if asked == -1 else asked
    if len(ids) <= length:
        return ids
    return ids[-length:] if request.truncation_side == "left" else ids[:length]


async def encode_messages(
    state: ServerState,
    tokenizer: Tokenizer,
    card: ModelCard,
    request: Conversation,
    warnings: list[str],
) -> Encoded:
    """The prompt of a conversation by the model's own template.

    Args:
        state: The server.
        tokenizer: With the template.
        card: Of the model.
        request: Messages and template variables.
        warnings: Gets names of variables that the template does not know.

    Raises:
        ApiError: 400.
    """
    opens = request.add_generation_prompt and "add_generation_prompt" in request.model_fields_set
    if opens and request.continue_final_message:
        raise invalid(
            "`add_generation_prompt` and `continue_final_message` exclude each other.",
            "continue_final_message",
        )
    messages = template_messages(request.messages, tokenizer)
    check_size([m["content"] for m in messages], card, "messages")
    variables = template_variables(request, tokenizer, warnings)
    try:
        return await state.in_thread(_render, tokenizer, request, messages, variables)
    except InvalidRequestError as error:
        raise ApiError(400, error.code, str(error), error.param) from None


def _render(
    tokenizer: Tokenizer,
    request: Conversation,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
) -> Encoded:
    opens = request.add_generation_prompt and not request.continue_final_message
    text = tokenizer.apply_chat_template(messages, opens, **variables)
    if request.continue_final_message:
        text = _up_to_last(text, messages[-1])
    owns_start = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token or "")
    special = request.add_special_tokens and not owns_start
    ids = tuple(tokenizer.encode(text, special))
    return Encoded(ids, text, is_opened(text))


def _up_to_last(text: str, message: Mapping[str, Any]) -> str:
    """A prompt without what the template writes after the last message."""
    content = str(message["content"]).strip()
    at = text.rfind(content)
    if message["role"] != "assistant" or not content or at < 0:
        raise InvalidRequestError(
            "`continue_final_message` needs a last message of the assistant with text that the "
            "chat template keeps.",
            param="continue_final_message",
        )
    return text[: at + len(content)]


def template_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Messages as templates read them.

    Raises:
        ApiError: 400 with the place of the message.
    """
    template = tokenizer.chat_template
    knows_developer = template is not None and "developer" in template.source
    return [_message(m, at, knows_developer) for at, m in enumerate(messages)]


def _message(message: Message, at: int, knows_developer: bool) -> dict[str, Any]:
    role = message.role
    if role == "developer" and not knows_developer:
        role = "system"
    thought = message.reasoning if message.reasoning is not None else message.reasoning_content
    may_be_silent = role == "assistant" and (message.tool_calls or thought is not None)
    if message.content is None and not may_be_silent:
        raise ApiError(
            400,
            "missing_field",
            f"`messages.{at}.content` is required.",
            f"messages.{at}.content",
        )
    found: dict[str, Any] = {"role": role, "content": message.content or ""}
    if thought is not None:
        found["reasoning"] = found["reasoning_content"] = thought
    if message.tool_calls:
        found["tool_calls"] = [_tool_call(call, at) for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    return found


def _tool_call(call: dict[str, Any], at: int) -> dict[str, Any]:
    """A call of the history; arguments become an object if they are one."""
    function = call.get("function")
    entry = cast("dict[str, Any]", function) if isinstance(function, dict) else {}
    if not isinstance(entry.get("name"), str):
        raise invalid("Each tool call needs `function.name`.", f"messages.{at}.tool_calls")
    arguments = entry.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None
        arguments = cast("Any", parsed if isinstance(parsed, dict) else arguments)
    return {**call, "type": "function", "function": {**entry, "arguments": arguments}}


def template_variables(
    request: Conversation, tokenizer: Tokenizer, warnings: list[str]
) -> dict[str, Any]:
    """Variables that a request sets, by name and plain value; unknown ones are left out.

    Raises:
        ApiError: 400.
    """
    known: frozenset[str] = (
        tokenizer.chat_template.variables if tokenizer.chat_template else frozenset()
    )
    variables: dict[str, Any] = {}
    for name, value in request.chat_template_kwargs.items():
        param = f"chat_template_kwargs.{name[:100]}"
        if isinstance(value, (dict, list)):
            raise invalid(f"The template variable {echo(name)} must be a plain value.", param)
        if tokenizer.chat_template is not None and tokenizer.chat_template.is_reserved(name):
            raise invalid(f"The template variable {echo(name)} is reserved.", param)
        if name in known:
            variables[name] = value
        else:
            warnings.append(f"chat_template_kwargs.{name}")
    variables.update(_thinking(request, known, warnings))
    return variables


def _thinking(request: Conversation, known: frozenset[str], warnings: list[str]) -> dict[str, Any]:
    wanted = False if request.reasoning_effort == "none" else request.thinking
    switches = known & {"enable_thinking", "thinking"}
    if wanted and request.thinking and not switches:
        raise unsupported("thinking", "is not available: this model's template has no such switch.")
    found: dict[str, Any] = {} if wanted is None else dict.fromkeys(switches, wanted)
    if request.reasoning_effort is not None:
        if "reasoning_effort" in known:
            found["reasoning_effort"] = request.reasoning_effort
        elif request.reasoning_effort != "none":
            warnings.append("reasoning_effort")
    return found
