"""`/tokenize` and `/detokenize`: what the model sees of a text."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_server.openai.errors import invalid
from vllm_server.openai.logprobs import TokenNames
from vllm_server.openai.prompts import Encoded, encode_messages, encode_prompts
from vllm_server.openai.requests import read, service_of, warning_headers
from vllm_server.openai.sampling import check_ids, check_model
from vllm_server.openai.schema import Conversation, DetokenizeRequest, TokenizeRequest
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.service import Service


async def tokenize(call: Call) -> Reply:
    """Token ids of a text or a conversation."""
    service = service_of(call)
    warnings: list[str] = []
    request = await read(call, TokenizeRequest, "tokenize", warnings)
    check_model(request.model, service.card)
    encoded = await _encode(call, service, request, warnings)
    body: dict[str, Any] = {
        "count": len(encoded.ids),
        "max_model_len": service.card.max_model_len,
        "tokens": encoded.ids,
    }
    if request.return_token_strs:
        names = TokenNames(service.tokenizer)
        body["token_strs"] = [names.name(i) for i in encoded.ids]
    return Reply(msgspec.json.encode(body), headers=warning_headers(warnings))


async def _encode(
    call: Call, service: Service, request: TokenizeRequest, warnings: list[str]
) -> Encoded:
    given = [n for n in ("prompt", "content", "messages") if getattr(request, n) is not None]
    if len(given) != 1:
        raise invalid("Give exactly one of `prompt`, `content` and `messages`.", "prompt")
    if request.messages is not None:
        conversation = Conversation.model_construct(
            **{name: getattr(request, name) for name in _CONVERSATION & request.model_fields_set}
        )
        return await encode_messages(
            call.state, service.tokenizer, service.card, conversation, warnings
        )
    text = request.prompt if request.prompt is not None else request.content or ""
    special = request.add_special_tokens is not False
    [encoded] = await encode_prompts(
        call.state, service.tokenizer, service.card, [text], special, given[0]
    )
    return encoded


_CONVERSATION = {
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "add_special_tokens",
}


async def detokenize(call: Call) -> Reply:
    """The text of token ids."""
    service = service_of(call)
    warnings: list[str] = []
    request = await read(call, DetokenizeRequest, "detokenize", warnings)
    check_model(request.model, service.card)
    check_ids(request.tokens, service.card.vocab_size, "tokens")
    text = await call.state.in_thread(
        service.tokenizer.decode, request.tokens, request.skip_special_tokens
    )
    return Reply(msgspec.json.encode({"prompt": text}), headers=warning_headers(warnings))
