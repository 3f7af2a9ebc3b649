"""The ASGI application: every route, once, with who may call it.

Knows where each route leads, and nothing of how it answers.
"""

from __future__ import annotations

from vllm_server.openai.chat import chat
from vllm_server.openai.completions import completions
from vllm_server.openai.document import Document
from vllm_server.openai.embeddings import embeddings
from vllm_server.openai.models import list_models, one_model
from vllm_server.openai.tokenization import detokenize, tokenize
from vllm_server.ops.health import health, live, load, show_version, shutdown
from vllm_server.ops.pipeline import Application
from vllm_server.ops.prometheus import HttpMetrics
from vllm_server.ops.routes import Handler, Route, RouteTable, Scope
from vllm_server.service import ServerState


def create_app(state: ServerState) -> Application:
    """The application over a state that may be completed later."""
    metrics = HttpMetrics(state)
    routes = [*_inference(), *_operations(state, metrics)]
    document = Document(routes)
    hardened = state.settings.server.hardened
    routes += [
        Route("/openapi.json", {"GET": document.openapi}, "key", needs_key=hardened),
        Route("/docs", {"GET": document.docs}, "key", needs_key=hardened),
    ]
    return Application(state, RouteTable(routes), metrics)


def _inference() -> list[Route]:
    return [
        _work("/v1/chat/completions", chat),
        _work("/v1/completions", completions),
        _work("/v1/embeddings", embeddings),
        *(_work(prefix + "/tokenize", tokenize) for prefix in ("", "/v1")),
        *(_work(prefix + "/detokenize", detokenize) for prefix in ("", "/v1")),
        Route("/v1/models", {"GET": list_models}, "key", is_limited=True),
        Route("/v1/models/{id}", {"GET": one_model}, "key", is_limited=True),
    ]


def _work(path: str, handler: Handler) -> Route:
    return Route(path, {"POST": handler}, "key", is_work=True, is_limited=True)


def _operations(state: ServerState, metrics: HttpMetrics) -> list[Route]:
    server = state.settings.server
    both = {"GET": health, "HEAD": health}
    metrics_scope: Scope = "public" if server.metrics_public else "metrics"
    scrape = {"GET": metrics.scrape}
    routes = [
        Route("/health", both, "public", is_quiet=True),
        Route("/v1/health", both, "public", is_quiet=True),
        Route("/health/live", {"GET": live}, "public", is_quiet=True),
        Route("/health/ready", {"GET": health}, "public", is_quiet=True),
        Route("/ping", {"GET": health}, "public", is_quiet=True),
        Route("/version", {"GET": show_version}, "public"),
        Route("/load", {"GET": load}, "key"),
        Route("/metrics", scrape, metrics_scope, is_quiet=True, needs_key=server.hardened),
    ]
    if server.shutdown_endpoint and not server.hardened:
        routes.append(Route("/shutdown", {"GET": shutdown, "POST": shutdown}, "admin"))
    return routes
