"""The request bodies of the API: every parameter that has an effect, with type and range.

Parameters that are refused or have no effect are in `vllm_server.openai.policy`. Nothing here
depends on the model; limits that do are checked in `vllm_server.openai.sampling`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_server.openai.fields import (
    BiasField,
    ContentField,
    IdsField,
    InputField,
    Int64,
    PromptField,
    Short,
    StopField,
    StopIdsField,
    WordsField,
)

MAX_MESSAGES = 4096
MAX_CHOICES = 128

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A request body; nothing is converted, names that are not fields are looked at elsewhere."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Truncation(Body):
    """How a prompt that is too long is cut."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"


class Generation(Truncation):
    """What chat and plain completions share."""

    model: Annotated[str, Field(max_length=4096)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=1e6)] | None = None
    seed: Int64 | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop: StopField = ()
    stop_token_ids: StopIdsField = ()
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    logit_bias: BiasField = ()
    allowed_token_ids: IdsField | None = None
    bad_words: WordsField = ()
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    session_id: Short | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]+$")] | (
        None
    ) = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    return_prompt_text: bool = False


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: ContentField = None
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class Conversation(Body):
    """What makes a prompt out of messages."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    thinking: bool | None = None


class ChatRequest(Conversation, Generation):
    """Body of `/v1/chat/completions`."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include_reasoning: bool = True
    separate_reasoning: bool = True


class CompletionRequest(Generation):
    """Body of `/v1/completions`."""

    prompt: PromptField
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    add_special_tokens: bool = True


class EmbeddingRequest(Truncation):
    """Body of `/v1/embeddings`."""

    input: InputField
    model: Annotated[str, Field(max_length=4096)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    normalize: bool = True
    add_special_tokens: bool = True
    cache_salt: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]+$")] | (
        None
    ) = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None


class TokenizeRequest(Body):
    """Body of `/tokenize`: one of `prompt`, `content` and `messages`."""

    model: Annotated[str, Field(max_length=4096)] | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: Annotated[str, Field(max_length=4096)] | None = None
    tokens: StopIdsField
    skip_special_tokens: bool = True


class ShutdownRequest(Body):
    """Body of `/shutdown`, which may also be absent."""

    mode: Literal["drain", "abort"] = "drain"
    timeout_s: Annotated[Finite, Field(ge=0, le=3600)] | None = None
