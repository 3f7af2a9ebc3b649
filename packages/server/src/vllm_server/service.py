"""What the HTTP layer serves, and the life of the server around it.

`launch` builds a `ServerState` before the model is there, tells it how loading goes, and completes
it with a `Service`. Knows no routes and no ASGI.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

from vllm_core import EngineStats
from vllm_traits import FinishReason, Request, RequestOutput

from vllm_server.config.schema import SamplingSettings, Settings
from vllm_server.ops.auth import Identity, KeyRing
from vllm_server.ops.limits import RateLimiter
from vllm_server.self_check import Findings
from vllm_server.text.tokenizer import Tokenizer

Phase = Literal["loading", "ready", "draining", "dead"]
Mode = Literal["drain", "abort"]
Result = TypeVar("Result")


class OutputStream(Protocol):
    """News of one running request."""

    @property
    def request_id(self) -> str:
        """The request's id."""
        ...

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def abort(self, reason: FinishReason = ...) -> None:
        """End the request; nothing if it has ended."""
        ...


class Health(Protocol):
    """Whether an engine makes progress."""

    @property
    def status(self) -> str:
        """`ok`, or a word for what is wrong."""
        ...

    @property
    def stalled_s(self) -> float:
        """Seconds without progress while work is pending."""
        ...


class EngineClient(Protocol):
    """What the server asks of an engine; `vllm_core.AsyncEngine` is one."""

    def generate(self, request: Request) -> OutputStream:
        """Queue a request; called on the event loop.

        Raises:
            InvalidRequestError: It can never run.
            QueueFullError: Too many wait.
            BackendError: The engine is not running.
        """
        ...

    def snapshot(self) -> EngineStats:
        """Counters, and gauges as of now."""
        ...

    def health(self) -> Health:
        """Whether it makes progress."""
        ...


@dataclass(frozen=True)
class ModelCard:
    """What the API says about the model.

    Attributes:
        names: Names the API accepts; the first one is shown.
        root: Where the weights come from.
        max_model_len: Longest sequence in tokens.
        vocab_size: Width of the logits.
        fingerprint: Value of `system_fingerprint`.
        hidden_size: Width of an embedding.
        pooling: How hidden states become an embedding.
        allows_dimensions: Whether an embedding may be shortened.
        created: Unix time in seconds.
        cache_config: Labels of the metric `cache_config_info`.
    """

    names: tuple[str, ...]
    root: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    hidden_size: int = 0
    pooling: Literal["mean", "last", "cls"] = "mean"
    allows_dimensions: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    cache_config: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def id(self) -> str:
        """The name that is shown."""
        return self.names[0]


@dataclass(frozen=True)
class Service:
    """A loaded model, ready to answer.

    Attributes:
        engine: Runs requests.
        tokenizer: Text and token ids.
        card: What the API says about the model.
        defaults: Sampling where a request is silent: settings over the model's own values.
        findings: What is known about the model's results; None if nobody looked.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    card: ModelCard
    defaults: SamplingSettings = field(default_factory=SamplingSettings)
    findings: Findings | None = None


class ServerState:
    """Everything the routes share.

    Args:
        settings: The merged configuration.
        request_shutdown: Called when a client may and does ask for the end, with the mode and the
            seconds that running streams get.
        clock: Monotonic seconds.

    Attributes:
        settings: As given.
        phase: Where the server is in its life.
        progress: Share of the loading that is done, 0 to 1.
        service: The model, once loaded.
        keys: Who may call.
        limiter: How often.
        running: Client-chosen request ids in use.
        num_streams: Event streams open now.
        threads: Two threads for templates and tokenizers.
        stall_seconds: Time after which a reader that takes nothing is given up.

    Raises:
        ConfigError: A key is malformed.
    """

    def __init__(
        self,
        settings: Settings,
        request_shutdown: Callable[[Mode, float], None] = lambda mode, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.request_shutdown = request_shutdown
        self.clock = clock
        self.phase: Phase = "loading"
        self.progress = 0.0
        self.service: Service | None = None
        self.keys = KeyRing(settings.auth, settings.server.hardened)
        self.limiter = RateLimiter(settings.auth, self.keys, clock)
        self.running: set[str] = set()
        self.num_streams = 0
        self.stall_seconds = 30.0
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._secret = secrets.token_bytes(32)
        self._num_open = 0
        self._idle: asyncio.Event | None = None

    def complete(self, service: Service) -> None:
        """The model is loaded: accept work, unless the end has been asked for meanwhile."""
        self.service = service
        self.progress = 1.0
        if self.phase == "loading":
            self.phase = "ready"

    def start_drain(self) -> None:
        """Refuse new work from now on; readiness turns 503 at once."""
        if self.phase != "dead":
            self.phase = "draining"

    def mark_dead(self) -> None:
        """Loading failed, or the engine cannot come back."""
        self.phase = "dead"

    @property
    def num_open(self) -> int:
        """Requests for the model that are being answered."""
        return self._num_open

    def enter(self) -> None:
        """A request for the model begins."""
        self._num_open += 1

    def leave(self) -> None:
        """It has been answered or given up."""
        self._num_open -= 1
        if self._num_open == 0 and self._idle is not None:
            self._idle.set()

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is being answered; false if the time runs out first."""
        if self._num_open == 0:
            return True
        self._idle = asyncio.Event()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def in_thread(self, work: Callable[..., Result], *args: object) -> Result:
        """Run text work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *args)

    def salt(self, identity: Identity, cache_salt: str | None) -> bytes:
        """The root of a caller's share of the prefix cache.

        Without keys all callers are one party; with keys each key is its own, unless sharing is
        switched on.
        """
        tenant = b"" if self.settings.engine.share_prefix_cache else identity.digest
        return self._keyed(b"salt", tenant, (cache_salt or "").encode())

    def session(self, identity: Identity, session_id: str) -> str:
        """A client's session id, as the engine knows it: scoped to the key and opaque."""
        return self._keyed(b"session", identity.digest, session_id.encode()).hex()

    def close(self) -> None:
        """Give back the threads."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _keyed(self, *parts: bytes) -> bytes:
        found = hashlib.sha256(self._secret)
        for part in parts:
            found.update(len(part).to_bytes(4, "little") + part)
        return found.digest()
