"""What every request passes, in order: head checks, route, caller, phase, rate, body, handler.

This is the one boundary where any exception becomes an answer. Pure ASGI; knows no model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vllm_traits import VllmLiteError

from vllm_server.logs import request_id
from vllm_server.openai.errors import ApiError, from_engine, internal_error, unavailable
from vllm_server.ops.access import authorize
from vllm_server.ops.asgi import Receive, Scope, Send
from vllm_server.ops.auth import Identity
from vllm_server.ops.cors import Cors
from vllm_server.ops.events import EventSender, EventStream, SlowReaderError
from vllm_server.ops.exchange import Exchange, Reply
from vllm_server.ops.prometheus import HttpMetrics
from vllm_server.ops.routes import Call, Route, RouteTable
from vllm_server.service import ServerState

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Application:
    """The ASGI application.

    Args:
        state: What the routes share.
        table: The routes.
        metrics: Counts requests.
    """

    def __init__(self, state: ServerState, table: RouteTable, metrics: HttpMetrics) -> None:
        self.state = state
        self.table = table
        self.metrics = metrics
        self._cors = Cors(state.settings.server.cors_origins)
        self._max_body = int(state.settings.server.max_body_size_mb * 1024 * 1024)
        self._hosts = frozenset(h.lower() for h in state.settings.server.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection event of an ASGI server."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(Exchange(scope, receive, send))

    async def _serve(self, exchange: Exchange) -> None:
        token = request_id.set(exchange.id)
        is_quiet = False
        try:
            is_quiet = await self._answer(exchange)
        except SlowReaderError:
            log.warning("a client took nothing for too long; its request is cancelled")
            exchange.cut()
        except asyncio.CancelledError:
            if not exchange.disconnected:
                raise
        finally:
            if not is_quiet:
                self.metrics.observe(exchange)
                _log_access(exchange)
            request_id.reset(token)

    async def _answer(self, exchange: Exchange) -> bool:
        """Answer, whatever happens; whether the logs should pass over it."""
        route: Route | None = None
        try:
            self._cors.mark(exchange)
            self._check_host(exchange)
            route, argument = self.table.find(exchange.path)
            exchange.handler = route.path
            if self._cors.is_preflight(exchange):
                await exchange.reply(self._cors.preflight(route))
                return True
            await self._dispatch(exchange, route, argument)
        except ApiError as error:
            self.metrics.reject(error)
            await _reply_error(exchange, error)
        except VllmLiteError as error:
            await _reply_error(exchange, from_engine(error))
        except (asyncio.CancelledError, SlowReaderError):
            raise
        except Exception:
            log.exception("a request failed")
            await _reply_error(exchange, internal_error())
        return route is not None and route.is_quiet

    async def _dispatch(self, exchange: Exchange, route: Route, argument: str) -> None:
        handler = self.table.handler(route, exchange.method)
        identity = self._identify(exchange, route)
        self._check_phase(route)
        if route.is_limited:
            self._check_rate(exchange, identity)
        call = Call(self.state, exchange, identity, argument=argument)
        if exchange.method == "POST":
            call.body = await exchange.read_body(self._max_body)
        if not route.is_work:
            await self._finish(exchange, await handler(call))
            return
        self.state.enter()
        try:
            await until_disconnect(self._work(call, handler(call)), exchange)
        finally:
            self.state.leave()

    async def _work(self, call: Call, answer: Any) -> None:
        await self._finish(call.exchange, await answer)

    async def _finish(self, exchange: Exchange, answer: Reply | EventStream) -> None:
        if isinstance(answer, Reply):
            await exchange.reply(answer)
            return
        self.state.num_streams += 1
        try:
            seconds = self.state.settings.server.sse_keep_alive_interval
            await EventSender(exchange, seconds, self.state.stall_seconds).run(answer)
        finally:
            self.state.num_streams -= 1

    def _identify(self, exchange: Exchange, route: Route) -> Identity:
        try:
            return authorize(route, exchange, self.state.keys)
        except ApiError:
            self.metrics.auth_failures.inc()
            raise

    def _check_host(self, exchange: Exchange) -> None:
        hosts = [value for name, value in exchange.headers if name == b"host"]
        if len(hosts) != 1:
            raise ApiError(400, "invalid_value", "A request needs exactly one Host header.")
        if self._hosts and _name(hosts[0]) not in self._hosts:
            raise ApiError(421, "misdirected_request", "This server does not answer to that Host.")

    def _check_phase(self, route: Route) -> None:
        if not route.is_work or self.state.phase == "ready":
            return
        if self.state.phase == "loading":
            raise unavailable("loading", "The model is being loaded; try again later.", 5)
        if self.state.phase == "draining":
            raise unavailable("draining", "The server is shutting down.", 5)
        raise ApiError(
            503,
            "engine_unavailable",
            "The engine is not running.",
            headers=[("retry-after", "30"), ("x-should-retry", "false")],
        )

    def _check_rate(self, exchange: Exchange, identity: Identity) -> None:
        verdict = self.state.limiter.hit(identity, exchange.peer)
        if verdict is None:
            return
        headers = verdict.headers()
        if verdict.allowed:
            exchange.extra_headers += [(n.encode(), v.encode()) for n, v in headers]
            return
        self.metrics.rate_limited.inc()
        raise ApiError(
            429,
            "rate_limit_exceeded",
            f"The limit of {verdict.limit} requests is reached; try again in "
            f"{verdict.reset:.1f} seconds.",
            headers=headers,
        )


async def until_disconnect(work: Coroutine[Any, Any, Result], exchange: Exchange) -> Result:
    """Run something until it is done or the client is gone; then it is cancelled.

    Raises:
        asyncio.CancelledError: The client is gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(exchange.wait_disconnect())
    watch.add_done_callback(lambda _: task.cancel())
    try:
        return await task
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    finally:
        watch.cancel()


async def _reply_error(exchange: Exchange, error: ApiError) -> None:
    if exchange.status:  # the head is out, so only the end of the connection can tell
        exchange.cut()
        return
    await exchange.reply(Reply(error.encoded(), error.status, error.headers))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _name(host: bytes) -> str:
    try:
        return (urlsplit("//" + host.decode("latin-1")).hostname or "").lower()
    except ValueError:
        return ""


def _log_access(exchange: Exchange) -> None:
    first = exchange.first_token_at
    log.info(
        "%s %s %s %d+%d tokens, ttft %s, %.0f ms",
        exchange.method,
        exchange.handler,
        exchange.status or "disconnected",
        exchange.num_prompt_tokens,
        exchange.num_completion_tokens,
        "-" if first is None else f"{(first - exchange.started) * 1000:.0f} ms",
        (time.perf_counter() - exchange.started) * 1000,
    )
