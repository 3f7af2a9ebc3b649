"""The form of the route table: what is served under which path, and who may call it.

A path that is not in the table does not exist; a route that is in it has a scope. Matching reads
the path as it was sent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from vllm_server.openai.errors import ApiError
from vllm_server.ops.auth import Identity
from vllm_server.ops.events import EventStream
from vllm_server.ops.exchange import Exchange, Reply
from vllm_server.service import ServerState

Scope = Literal["public", "key", "metrics", "admin"]


@dataclass
class Call:
    """What a handler gets.

    Attributes:
        state: The server.
        exchange: Request and answer.
        identity: Who calls.
        body: The request body.
        argument: The part of the path that the route leaves open.
    """

    state: ServerState
    exchange: Exchange
    identity: Identity
    body: bytes = b""
    argument: str = ""


Handler = Callable[[Call], Awaitable[Reply | EventStream]]


@dataclass(frozen=True)
class Route:
    """One path.

    Attributes:
        path: The path; with a last part `{id}` the rest of the path is the argument.
        handlers: By method.
        scope: Who may call.
        is_work: Whether it needs the model and counts as work to be drained.
        is_limited: Whether it counts against the caller's rate.
        is_quiet: Whether access log and HTTP metrics leave it out.
        needs_key: Whether nobody passes without a key even where none are configured.
    """

    path: str
    handlers: Mapping[str, Handler]
    scope: Scope
    is_work: bool = False
    is_limited: bool = False
    is_quiet: bool = False
    needs_key: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """What `Allow` says."""
        return tuple(self.handlers)


class RouteTable:
    """Finds routes.

    Args:
        routes: Every route; paths are unique.
    """

    def __init__(self, routes: Sequence[Route]) -> None:
        self.routes = tuple(routes)
        self._exact = {r.path: r for r in routes if not r.path.endswith("/{id}")}
        self._open = {r.path.removesuffix("{id}"): r for r in routes if r.path.endswith("/{id}")}

    def find(self, path: str) -> tuple[Route, str]:
        """The route of a path and its argument.

        Raises:
            ApiError: 404 `not_found`.
        """
        route = self._exact.get(path)
        if route is not None:
            return route, ""
        for prefix, candidate in self._open.items():
            if path.startswith(prefix) and len(path) > len(prefix):
                return candidate, unquote(path[len(prefix) :])
        raise ApiError(404, "not_found", "There is no such path; /openapi.json lists them.")

    def handler(self, route: Route, method: str) -> Handler:
        """The handler of a method.

        Raises:
            ApiError: 405 with `Allow`.
        """
        handler = route.handlers.get(method)
        if handler is None:
            allow = ", ".join(route.methods)
            raise ApiError(
                405,
                "method_not_allowed",
                f"This path takes {allow} only.",
                headers=[("allow", allow)],
            )
        return handler
