"""How often a key, or without keys a peer, may call: a sliding window of requests.

A refused request does not count. Knows no routes.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from vllm_server.config.schema import AuthSettings
from vllm_server.ops.auth import Identity, KeyRing

DEFAULT_REQUESTS = 100
DEFAULT_WINDOW = 60.0
MAX_CALLERS = 10_000


class Verdict(NamedTuple):
    """What the window says about one request.

    Attributes:
        allowed: Whether it may pass; then it has been counted.
        limit: Requests per window.
        remaining: Requests left in the window after this one.
        reset: Seconds until the oldest counted request leaves the window.
    """

    allowed: bool
    limit: int
    remaining: int
    reset: float

    def headers(self) -> list[tuple[str, str]]:
        """The headers of every limited answer, and when to try again on a refusal."""
        limit, remaining = str(self.limit), str(self.remaining)
        found = [
            ("x-ratelimit-limit-requests", limit),
            ("x-ratelimit-remaining-requests", remaining),
            ("x-ratelimit-reset-requests", f"{self.reset:.3f}s"),
            ("x-ratelimit-limit", limit),
            ("x-ratelimit-remaining", remaining),
        ]
        if not self.allowed:
            found.append(("retry-after", str(max(1, math.ceil(self.reset)))))
            found.append(("retry-after-ms", str(max(1, math.ceil(self.reset * 1000)))))
        return found


class SlidingWindow:
    """Times of counted requests by caller.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._times: OrderedDict[bytes, deque[float]] = OrderedDict()

    def hit(self, caller: bytes, limit: int, seconds: float) -> Verdict:
        """Count a request if fewer than `limit` were counted in the last `seconds`."""
        now = self._clock()
        times = self._times.setdefault(caller, deque())
        self._times.move_to_end(caller)
        if len(self._times) > MAX_CALLERS:
            self._times.popitem(last=False)
        while times and times[0] <= now - seconds:
            times.popleft()
        allowed = len(times) < limit
        if allowed:
            times.append(now)
        return Verdict(allowed, limit, limit - len(times), times[0] + seconds - now)


class RateLimiter:
    """The limits of a server's settings.

    Args:
        auth: The settings; with neither limit nor keys nothing is limited.
        keys: Whether there are any decides on the default.
        clock: Monotonic seconds.
    """

    def __init__(self, auth: AuthSettings, keys: KeyRing, clock: Callable[[], float]) -> None:
        self._auth = auth
        self._keys = keys
        self._window = SlidingWindow(clock)

    def hit(self, identity: Identity, peer: str | None) -> Verdict | None:
        """Count a request; None if this caller is not limited."""
        limit, seconds = self._limits(identity)
        if limit == 0:
            return None
        caller = identity.digest or b"peer:" + (peer or "unix").encode()
        return self._window.hit(caller, limit, seconds)

    def _limits(self, identity: Identity) -> tuple[int, float]:
        auth = self._auth
        given = (auth.rate_limit_requests, auth.rate_limit_window_secs)
        in_force = len(self._keys) > 0 or given != (None, None)
        default = DEFAULT_REQUESTS if in_force else 0
        limit = auth.rate_limit_requests if auth.rate_limit_requests is not None else default
        if identity.rate_limit_requests is not None:
            limit = identity.rate_limit_requests
        seconds = identity.rate_limit_window_secs or auth.rate_limit_window_secs or DEFAULT_WINDOW
        return int(limit), seconds
