"""The life of the server process: listen, load, serve, drain, end.

Knows signals, the event loop and uvicorn; what is served is `vllm_server.app`'s business, and what
answers it `vllm_server.launch`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import uvicorn
from vllm_core import AsyncEngine
from vllm_models import LoadProgress
from vllm_traits import BackendError, ConfigError, VllmLiteError

from vllm_server.app import create_app
from vllm_server.background import in_background
from vllm_server.banner import banner, exposure_warning
from vllm_server.config import Settings
from vllm_server.launch import make_service, model_source, start_engine, start_loading
from vllm_server.listen import addresses
from vllm_server.ops.http_protocol import uvicorn_config
from vllm_server.progress import Stopwatch, shown_progress
from vllm_server.service import Mode, ServerState

log = logging.getLogger(__name__)

CLEAN, INTERRUPTED = 0, 130
# Share of the whole start that lies behind when a stage begins, and its own share.
_STAGES = {
    "download": (0.0, 0.5),
    "load": (0.5, 0.4),
    "warm-up": (0.9, 0.05),
    "self-check": (0.95, 0.05),
}
_FLUSH_SECONDS = 2  # for the last events of streams that were cut off
_WATCH_SECONDS = 0.5  # how often the engine's health is looked at
_FIRST = asyncio.FIRST_COMPLETED


class Server:
    """One run of the server.

    Args:
        settings: The checked configuration.
        listener: A listening socket; closed at the end.
    """

    def __init__(self, settings: Settings, listener: socket.socket) -> None:
        self.settings = settings
        self.state = ServerState(settings, self._shutdown_requested)
        self._listener = listener
        config = uvicorn_config(
            create_app(self.state), settings.server, timeout_graceful_shutdown=_FLUSH_SECONDS
        )
        self._uvicorn = _Uvicorn(config)
        self._engine: AsyncEngine | None = None
        self._end: asyncio.Future[tuple[Mode, float]]
        self._hurry: asyncio.Future[int]

    async def run(self) -> int:
        """Serve until a signal or a request ends it; the exit code.

        Raises:
            VllmLiteError: The model could not be loaded.
        """
        loop = asyncio.get_running_loop()
        self._end, self._hurry = loop.create_future(), loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_keys)
        serving = asyncio.create_task(self._uvicorn.serve([self._listener]))
        try:
            engine = await self._load()
            if engine is not None:
                await self._serve_until_the_end(engine, serving)
            return await self._finish()
        finally:
            self._uvicorn.should_exit = True
            self._uvicorn.force_exit = self._hurry.done()
            await serving
            self.state.close()
            if self.settings.server.uds:
                Path(self.settings.server.uds).unlink(missing_ok=True)

    async def _load(self) -> AsyncEngine | None:
        """Load the model and start its engine; None if the end was asked for first."""
        where = addresses(self.settings.server, self._listener)
        source = model_source(self.settings.engine)
        log.info("Loading %s; %s/health says how far it is", source, where[0])
        with shown_progress() as show:
            watch = Stopwatch(show)
            loading = asyncio.wrap_future(
                start_loading(self.settings, lambda news: self._note(news, watch))
            )
            await _first(loading, self._end)
        if self._end.done():
            loading.cancel()
            return None
        try:
            model = loading.result()
        except VllmLiteError:
            self.state.mark_dead()
            raise
        self._engine = start_engine(model)
        service = make_service(self.settings, model, self._engine)
        self.state.complete(service)
        watch.stop()
        names = (self.settings, service.card.id, model.memory, model.findings)
        for line in banner(*names, watch.seconds, where):
            log.info("%s", line)
        return self._engine

    async def _serve_until_the_end(self, engine: AsyncEngine, serving: asyncio.Task[None]) -> None:
        """Until somebody ends it; an engine or a listener that dies ends it with an error.

        Raises:
            BackendError: Nobody asked for the end.
        """
        while (health := engine.health()).status == "ok":
            await asyncio.wait({self._end, serving}, timeout=_WATCH_SECONDS, return_when=_FIRST)
            if self._end.done():
                return
            if serving.done():
                raise BackendError("The HTTP server ended by itself.")
        self.state.mark_dead()
        await self._close(engine)
        raise BackendError(f"{health.error} Start the server again; its state is lost.")

    def _note(self, news: LoadProgress, watch: Stopwatch) -> None:
        behind, share = _STAGES[news.stage]
        self.state.progress = behind + share * news.fraction
        watch(news)

    async def _finish(self) -> int:
        """Let running streams end, or cut them off when time or patience is over."""
        mode, seconds = self._end.result()
        self.state.start_drain()
        if mode == "drain" and self.state.num_open:
            log.info("Draining %d requests, %g s at most", self.state.num_open, seconds)
            await _first(asyncio.ensure_future(self.state.wait_idle(seconds)), self._hurry)
        if self._engine is not None:
            if self.state.num_open:
                log.warning("Cutting off %d requests", self.state.num_open)
            await self._close(self._engine)
        log.info("Stopped")
        return self._hurry.result() if self._hurry.done() else CLEAN

    async def _close(self, engine: AsyncEngine) -> None:
        """End what still runs; a step that takes long is not waited for once somebody hurries."""
        closing = asyncio.wrap_future(in_background(engine.close, "close"))
        await _first(closing, self._hurry)
        await asyncio.wait({closing}, timeout=_FLUSH_SECONDS)
        await self.state.wait_idle(_FLUSH_SECONDS)

    def _on_signal(self, number: int) -> None:
        """The first signal drains, the second one cuts off."""
        if not self._end.done():
            log.info("%s: no new work is accepted", signal.Signals(number).name)
            self._shutdown_requested("drain", self.settings.server.shutdown_timeout_secs)
        elif not self._hurry.done():
            self._hurry.set_result(INTERRUPTED)
        else:
            os._exit(INTERRUPTED)

    def _shutdown_requested(self, mode: Mode, seconds: float) -> None:
        """By a signal or over HTTP; whoever asks again wants it now."""
        if not self._end.done():
            self.state.start_drain()
            self._end.set_result((mode, seconds))
        elif not self._hurry.done():
            self._hurry.set_result(CLEAN)

    def _reload_keys(self) -> None:
        try:
            self.state.keys.reload()
            log.info("Read the API keys again: %d", len(self.state.keys))
        except ConfigError as error:
            log.error("The API keys stay as they are: %s", error)


async def _first(work: asyncio.Future[Any], other: asyncio.Future[Any]) -> None:
    """Wait until one of two is done, or both."""
    await asyncio.wait({work, other}, return_when=_FIRST)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def serve(settings: Settings, listener: socket.socket) -> int:
    """Run a server in this thread until it ends; the exit code.

    Raises:
        VllmLiteError: The model could not be loaded.
    """
    warning = exposure_warning(settings)
    if warning:
        log.warning("%s", warning)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(Server(settings, listener).run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop where it is installed."""
    if find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
