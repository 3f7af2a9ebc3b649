"""`/v1/embeddings`: vectors of texts."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
from vllm_traits import (
    FinishReason,
    PoolingParams,
    Request,
    VllmLiteError,
)

from vllm_server.openai.errors import ApiError, from_engine, from_output, invalid, unavailable
from vllm_server.openai.prompts import encode_prompts, truncated
from vllm_server.openai.requests import read, service_of, unique_id, warning_headers
from vllm_server.openai.sampling import check_model, check_priority
from vllm_server.openai.schema import EmbeddingRequest
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.service import EngineClient, ModelCard, OutputStream


async def embeddings(call: Call) -> Reply:
    """Turn every input into a vector."""
    if not call.state.settings.server.embeddings:
        raise ApiError(
            501,
            "not_supported",
            "Embeddings are switched off on this server.",
            headers=[("x-should-retry", "false")],
        )
    service = service_of(call)
    warnings: list[str] = []
    request = await read(call, EmbeddingRequest, "embeddings", warnings)
    model = check_model(request.model, service.card)
    params = _params(request, service.card)
    encoded = await encode_prompts(
        call.state,
        service.tokenizer,
        service.card,
        request.input,
        request.add_special_tokens,
        "input",
    )
    prompts = [_fitting(p.ids, request, service.card) for p in encoded]
    priority = check_priority(request.priority, call.exchange.header(b"x-priority"))
    salt = call.state.salt(call.identity, request.cache_salt)
    base = f"embd-{unique_id(call)}"
    requests = [
        Request(f"{base}-{i}", ids, params, priority, salt) for i, ids in enumerate(prompts)
    ]
    call.exchange.num_prompt_tokens = num_tokens = sum(map(len, prompts))
    vectors = await _run(service.engine, requests, call.state.settings.server.request_timeout)
    body: dict[str, Any] = {
        "object": "list",
        "id": base,
        "model": model,
        "data": [
            {"object": "embedding", "index": i, "embedding": _shown(v, request)}
            for i, v in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return Reply(msgspec.json.encode(body), headers=warning_headers(warnings))


def _params(request: EmbeddingRequest, card: ModelCard) -> PoolingParams:
    dimensions = request.dimensions
    if dimensions is not None and dimensions != card.hidden_size:
        if not card.allows_dimensions:
            raise invalid("This model's embeddings cannot be shortened.", "dimensions")
        if dimensions > card.hidden_size:
            raise invalid(
                f"`dimensions` is {dimensions}, more than the model's {card.hidden_size}.",
                "dimensions",
            )
    return PoolingParams(card.pooling, request.normalize, dimensions)


def _fitting(ids: tuple[int, ...], request: EmbeddingRequest, card: ModelCard) -> tuple[int, ...]:
    """A prompt cut as asked, if it then fits."""
    ids = truncated(ids, request, card.max_model_len)
    if not ids:
        raise invalid("An input has no tokens.", "input")
    if len(ids) > card.max_model_len:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {card.max_model_len} tokens, but the input "
            f"is too large: it has {len(ids)} tokens.",
            "input",
            extra={"n_prompt_tokens": len(ids), "n_ctx": card.max_model_len},
        )
    return ids


async def _run(
    engine: EngineClient, requests: Sequence[Request], seconds: float
) -> list[tuple[float, ...]]:
    """The vectors, in order; whatever happens, nothing keeps running."""
    with ExitStack() as running:
        streams: list[OutputStream] = []
        for request in requests:
            try:
                stream = engine.generate(request)
            except VllmLiteError as error:
                raise from_engine(error, "input") from None
            running.callback(stream.abort)
            streams.append(stream)
        try:
            async with asyncio.timeout(seconds):
                return [await _vector(stream) for stream in streams]
        except TimeoutError:
            raise ApiError(
                504, "generation_timeout", f"There was no answer within {seconds:g} seconds."
            ) from None


async def _vector(stream: OutputStream) -> tuple[float, ...]:
    async for output in stream:
        if output.finish_reason is FinishReason.ERROR:
            raise from_output(output.error)
        if output.finish_reason is FinishReason.ABORT:
            raise unavailable("draining", "The server is shutting down; the answer is cut.", 5)
        if output.embedding:
            return output.embedding
    raise from_output(None)


def _shown(vector: tuple[float, ...], request: EmbeddingRequest) -> Any:
    if request.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
