"""Who is calling: API keys, their scopes, and what counts as a call from this machine.

Only digests of keys are kept, and every comparison looks at all of them in constant time. Knows
no routes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from vllm_traits import ConfigError

from vllm_server.config.schema import AuthSettings

SCOPES = frozenset({"inference", "metrics", "admin"})
MIN_HARDENED_KEY = 16

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Identity:
    """Somebody who calls.

    Attributes:
        name: For logs; never the key.
        digest: SHA-256 of the key, empty for nobody in particular.
        scopes: What the caller may do.
        rate_limit_requests: Own limit of requests per window; None is the server's.
        rate_limit_window_secs: Own window in seconds; None is the server's.
    """

    name: str
    digest: bytes = b""
    scopes: frozenset[str] = frozenset()
    rate_limit_requests: int | None = None
    rate_limit_window_secs: float | None = None


ANYBODY = Identity("anybody", scopes=frozenset({"inference", "metrics"}))


class KeyRing:
    """The keys a server accepts.

    Args:
        auth: The settings.
        hardened: Refuse short keys.

    Raises:
        ConfigError: A key is malformed or the file cannot be read; never shows a key.
    """

    def __init__(self, auth: AuthSettings, hardened: bool = False) -> None:
        self._auth = auth
        self._min_length = MIN_HARDENED_KEY if hardened else 1
        self._entries: tuple[Identity, ...] = ()
        self.reload()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def has_admins(self) -> bool:
        """Whether keys of the list `admin_keys` exist."""
        return bool(self._auth.admin_keys)

    def reload(self) -> None:
        """Read the key file again; the keys in use stay if it is wrong.

        Raises:
            ConfigError: As for the constructor.
        """
        admin = [self._entry(k, f"admin-{i}", SCOPES) for i, k in enumerate(self._auth.admin_keys)]
        users = [*self._auth.api_keys, *_lines(self._auth.api_keys_file)]
        plain = frozenset({"inference"})
        self._entries = (*admin, *(self._entry(k, f"key-{i}", plain) for i, k in enumerate(users)))

    def find(self, secret: str) -> Identity | None:
        """Whose key this is; looks at every key whatever is found."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found: Identity | None = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest) and found is None:
                found = entry
        return found

    def _entry(self, raw: Any, name: str, scopes: frozenset[str]) -> Identity:
        entry = cast("dict[str, Any]", raw) if isinstance(raw, Mapping) else {"key": raw}
        name = str(entry.get("name", name))
        limits = _limits(entry.get("limits") or {}, name)
        return Identity(
            name=name,
            digest=self._digest(entry.get("key"), name),
            scopes=_scopes(entry.get("scopes"), name) or scopes,
            rate_limit_requests=limits.get("rate_limit_requests"),
            rate_limit_window_secs=limits.get("rate_limit_window_secs"),
        )

    def _digest(self, key: Any, name: str) -> bytes:
        if not isinstance(key, str) or not key.strip():
            raise ConfigError(f"The API key {name!r} is empty.")
        found = _DIGEST.fullmatch(key)
        if found:
            return bytes.fromhex(found.group(1))
        if key.startswith("sha256:"):
            raise ConfigError(f"The API key {name!r} must have 64 hex digits after sha256:.")
        if len(key) < self._min_length:
            raise ConfigError(
                f"The API key {name!r} has {len(key)} characters; a hardened server needs at "
                f"least {self._min_length}."
            )
        return hashlib.sha256(key.encode()).digest()


def _scopes(raw: Any, name: str) -> frozenset[str]:
    words = [raw] if isinstance(raw, str) else list(cast("Iterable[Any]", raw or ()))
    for word in words:
        if word not in SCOPES:
            known = ", ".join(sorted(SCOPES))
            raise ConfigError(f"The API key {name!r} has an unknown scope; known are {known}.")
    return frozenset(words)


def _limits(raw: Any, name: str) -> Mapping[str, Any]:
    known = ("rate_limit_requests", "rate_limit_window_secs")
    limits = cast("dict[str, Any]", raw) if isinstance(raw, Mapping) else {"": 0}
    for word, value in limits.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if word not in known or not is_number or value < 0:
            raise ConfigError(
                f"The limits of the API key {name!r} may have {' and '.join(known)}, as numbers."
            )
    return limits


def _lines(path: str | None) -> list[str]:
    """One key per line; blank lines and lines that begin with # do not count."""
    if path is None:
        return []
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"Cannot read the file of API keys {path}.") from None
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def credentials(headers: Sequence[tuple[bytes, bytes]]) -> set[str]:
    """Every key a request shows, as bearer token or `x-api-key`."""
    found: set[str] = set()
    for name, value in headers:
        text = value.decode("utf-8", "surrogateescape").strip()
        if name == b"authorization":
            word, _, token = text.partition(" ")
            if word.lower() == "bearer" and token.strip():
                found.add(token.strip())
        elif name == b"x-api-key" and text:
            found.add(text)
    return found


_FORWARDED = frozenset({b"forwarded", b"via", b"x-real-ip"})
_PREFETCH = frozenset({b"purpose", b"sec-purpose", b"x-purpose", b"x-moz"})
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def is_local(peer: str | None, headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a call certainly comes from a program on this machine.

    Neither a web page nor a proxy nor a name that resolves to this machine passes.

    Args:
        peer: Address of the socket, None for a Unix socket.
        headers: Lower-case names and values.
    """
    return (
        _is_loopback(peer)
        and not is_foreign(headers)
        and not any(n in _FORWARDED or n.startswith(b"x-forwarded-") for n, _ in headers)
        and not any(n in _PREFETCH for n, _ in headers)
        and all(_host_name(v) in _LOCAL_HOSTS for n, v in headers if n == b"host")
    )


def is_foreign(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Whether a web page of another origin is behind a call."""
    host = next((v for n, v in headers if n == b"host"), b"").decode("latin-1").lower()
    for name, value in headers:
        if name == b"origin" and urlsplit(value.decode("latin-1").lower()).netloc != host:
            return True
        if name == b"sec-fetch-site" and value not in (b"none", b"same-origin"):
            return True
    return False


def _is_loopback(peer: str | None) -> bool:
    if peer is None:
        return True
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _host_name(value: bytes) -> str | None:
    try:
        return urlsplit("//" + value.decode("latin-1")).hostname
    except ValueError:
        return None
