"""`/openapi.json`, generated from the request models and the route table, and `/docs`.

The page has no script and loads nothing from anywhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
from pydantic import BaseModel

from vllm_server.openai.errors import TYPES
from vllm_server.openai.policy import IDLE, REFUSED
from vllm_server.openai.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    ShutdownRequest,
    TokenizeRequest,
)
from vllm_server.ops.exchange import Reply
from vllm_server.ops.health import project_version
from vllm_server.ops.routes import Call, Route

_BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/v1/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
    "/shutdown": ShutdownRequest,
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted(set(TYPES.values()))},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace}table{border-collapse:collapse;width:100%}"
    "td,th{border-bottom:1px solid #ccc;padding:.25rem .5rem;text-align:left;vertical-align:top}"
)


class Document:
    """The description of an API.

    Args:
        routes: What it has.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self._description = _describe(routes)
        self._json = msgspec.json.encode(self._description)
        self._page = _page(self._description).encode()

    async def openapi(self, call: Call) -> Reply:
        """The OpenAPI document."""
        return Reply(self._json)

    async def docs(self, call: Call) -> Reply:
        """The same for people."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
        headers = [("content-security-policy", policy)]
        return Reply(self._page, headers=headers, content_type="text/html; charset=utf-8")


def _describe(routes: Sequence[Route]) -> dict[str, Any]:
    models = {model.__name__: model for model in _BODIES.values()}
    schemas: dict[str, Any] = {"Error": _ERROR}
    for name, model in models.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[name] = schema
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-lite", "version": project_version()},
        "paths": {r.path: {m.lower(): _operation(r, m) for m in r.handlers} for r in routes},
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, method: str) -> dict[str, Any]:
    summary = (route.handlers[method].__doc__ or "").split("\n")[0].rstrip(".")
    error = {"schema": {"$ref": "#/components/schemas/Error"}}
    found: dict[str, Any] = {
        "summary": summary,
        "operationId": f"{method.lower()}{route.path.replace('/', '_').replace('{id}', 'id')}",
        "responses": {
            "200": {"description": "Success."},
            "default": {"description": "Error.", "content": {"application/json": error}},
        },
    }
    if route.path.endswith("{id}"):
        found["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    if route.scope != "public":
        found["security"] = [{"key": list[str]()}]
    body = _BODIES.get(route.path)
    if body is not None and method == "POST":
        content = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        found["requestBody"] = {
            "required": route.path != "/shutdown",
            "content": {"application/json": content},
        }
    return found


def _page(description: Mapping[str, Any]) -> str:
    rows: list[str] = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            rows.append(
                f"<tr><td><code>{method.upper()}</code></td><td><code>{html.escape(path)}</code>"
                f"</td><td>{html.escape(operation['summary'])}</td></tr>"
            )
    models = "".join(
        _model_table(name, schema)
        for name, schema in description["components"]["schemas"].items()
        if name.endswith("Request")
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>vllm-lite API</title>'
        f"<style>{_STYLE}</style></head><body><h1>vllm-lite API</h1><p>Version "
        f"{html.escape(description['info']['version'])}. Machine-readable: "
        '<a href="openapi.json">openapi.json</a>.</p><table><tr><th>Method</th><th>Path</th>'
        f"<th>What it does</th></tr>{''.join(rows)}</table>{models}{_refused()}</body></html>"
    )


def _refused() -> str:
    """The parameters that are known and answered with 400 `unsupported_parameter`."""
    rows: dict[str, list[str]] = {}
    for route, table in REFUSED.items():
        for name, refusal in table.items():
            only = ", ".join(map(repr, refusal.neutral))
            passes = f" Accepted: {only}." if only else ""
            rows.setdefault(f"{name}\n{refusal.reason}{passes}", []).append(route)
    cells = "".join(
        f"<tr><td><code>{html.escape(text.partition(chr(10))[0])}</code></td><td>"
        f"{html.escape(text.partition(chr(10))[2])}</td><td>{', '.join(routes)}</td></tr>"
        for text, routes in rows.items()
    )
    idle = ", ".join(f"<code>{name}</code>" for name in sorted(IDLE))
    return (
        f"<h2>Refused parameters</h2><table>{cells}</table>"
        f"<h2>Parameters without effect</h2><p>{idle}</p>"
    )


def _model_table(name: str, schema: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code></td><td>{html.escape(_kind(shape))}</td></tr>"
        for field, shape in cast("dict[str, Any]", schema.get("properties", {})).items()
    )
    return f"<h2>{html.escape(name)}</h2><table>{rows}</table>"


def _kind(shape: Mapping[str, Any]) -> str:
    """Type and range in a few words."""
    if "anyOf" in shape:
        return " or ".join(_kind(each) for each in shape["anyOf"])
    if "$ref" in shape:
        return str(shape["$ref"]).rsplit("/", 1)[1]
    if "enum" in shape:
        return ", ".join(map(str, shape["enum"]))
    limits = [
        f"{word} {shape[key]}"
        for key, word in (
            ("minimum", "from"), ("exclusiveMinimum", "above"),
            ("maximum", "to"), ("exclusiveMaximum", "below"),
        )
        if key in shape
    ]  # fmt: skip
    return " ".join([str(shape.get("type", "")), *limits]).strip()
