"""Which pages of other origins may call; nobody unless configured."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_server.ops.exchange import Exchange, Reply
from vllm_server.ops.routes import Route

_EXPOSED = (
    "x-request-id, retry-after, retry-after-ms, x-vllm-lite-warning, x-ratelimit-limit-requests, "
    "x-ratelimit-remaining-requests, x-ratelimit-reset-requests"
)


class Cors:
    """Answers browsers about origins.

    Args:
        origins: Allowed origins; `*` allows all.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    def mark(self, exchange: Exchange) -> None:
        """Let the page read the answer, if its origin is allowed."""
        origin = self._allowed(exchange)
        if origin is not None:
            exchange.extra_headers += [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", _EXPOSED.encode()),
                (b"vary", b"origin"),
            ]

    def is_preflight(self, exchange: Exchange) -> bool:
        """Whether a browser asks before it calls, from an allowed origin."""
        return (
            exchange.method == "OPTIONS"
            and exchange.header(b"access-control-request-method") is not None
            and self._allowed(exchange) is not None
        )

    def preflight(self, route: Route) -> Reply:
        """What a page may send to a route; needs no key and does nothing."""
        headers = [
            ("access-control-allow-methods", ", ".join(route.methods)),
            (
                "access-control-allow-headers",
                "authorization, content-type, x-api-key, x-request-id, x-session-id, x-priority",
            ),
            ("access-control-max-age", "600"),
        ]
        return Reply(b"", 204, headers)

    def _allowed(self, exchange: Exchange) -> bytes | None:
        origin = exchange.header(b"origin")
        if origin is None or not self._origins:
            return None
        if "*" in self._origins:
            return b"*"
        return origin if origin.decode("latin-1") in self._origins else None
