"""`/v1/models`: what is served."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_server.openai.errors import model_not_found
from vllm_server.openai.requests import service_of
from vllm_server.ops.exchange import Reply
from vllm_server.ops.routes import Call
from vllm_server.service import ModelCard


async def list_models(call: Call) -> Reply:
    """Every name the model has."""
    card = service_of(call).card
    data = [_entry(name, card) for name in card.names]
    return Reply(msgspec.json.encode({"object": "list", "data": data}))


async def one_model(call: Call) -> Reply:
    """One name."""
    card = service_of(call).card
    if call.argument not in card.names:
        raise model_not_found(call.argument, card.names)
    return Reply(msgspec.json.encode(_entry(call.argument, card)))


def _entry(name: str, card: ModelCard) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "vllm-lite",
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
