"""Opens the socket the server listens on, before anything slow begins."""

from __future__ import annotations

import errno
import socket
import stat
from pathlib import Path

from vllm_traits import ConfigError

from vllm_server.config import ServerSettings

_BACKLOG = 2048


def open_socket(server: ServerSettings) -> socket.socket:
    """A bound and listening socket; port 0 becomes a free one.

    Raises:
        ConfigError: The address is in use, not ours, or not allowed; says what to do.
    """
    if server.uds:
        return _open_unix(Path(server.uds))
    try:
        found = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise ConfigError(
            f"--host {server.host!r} is no address of a machine: {error.strerror}."
        ) from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(_explanation(error, server)) from None
    return listener


def _explanation(error: OSError, server: ServerSettings) -> str:
    where = f"port {server.port} of {server.host}"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"Cannot listen on {where}: another process does. Stop it, choose another port "
                "with --port, or let --port 0 pick a free one."
            )
        case errno.EACCES:
            return f"Cannot listen on {where}: ports below 1024 need privileges; choose another."
        case errno.EADDRNOTAVAIL:
            return f"Cannot listen on {where}: this machine does not have that address."
        case _:
            return f"Cannot listen on {where}: {error.strerror}."


def _open_unix(path: Path) -> socket.socket:
    """A socket file that nobody answers on is a left-over and makes room."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
            path.unlink()
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
        raise ConfigError(f"Cannot listen on --uds {path}: {reason}.") from None
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def addresses(server: ServerSettings, listener: socket.socket) -> list[str]:
    """Where clients find the server, the nearest first."""
    if server.uds:
        return [f"unix:{server.uds}"]
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        return [f"http://127.0.0.1:{port}", f"http://{socket.gethostname()}:{port}"]
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"]
