"""A real server process with the embedded model, shared by the tests of this folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

STARTUP_SECONDS = 90


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process on a port of its own."""

    def __init__(self, *flags: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        program = Path(sys.executable).with_name("vllm-lite-server")
        self._log_file = log.open("w")
        self.process = subprocess.Popen(
            [str(program), "--host", "127.0.0.1", "--port", str(self.port), *flags],
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"NO_COLOR": "1"},
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {STARTUP_SECONDS} s:\n{self.log.read_text()}")

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all of its rows with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        rows = [
            line
            for line in httpx.get(f"{self.url}/metrics").text.splitlines()
            if line.startswith((name + "{", name + " ")) and all(w in line for w in wanted)
        ]
        assert rows or labels, f"no metric {name}"
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows)

    def wait_until_idle(self) -> None:
        """Until nothing runs or waits; metrics are read from live state."""
        deadline = time.monotonic() + 30
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "requests are still running"
            time.sleep(0.02)

    def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        code = self.process.wait(timeout=60)
        self._log_file.close()
        return code


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own, and ends them with it."""
    servers: list[Server] = []

    def start(*flags: str) -> Server:
        servers.append(Server(*flags, log=tmp_path / f"server-{len(servers)}.txt"))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model on default settings, with room for many streams."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    server = Server("--max-num-seqs", "256", log=log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        code = server.stop()
    assert code == 0, f"exit code {code}:\n{log.read_text()}"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test no request runs and no block is held."""
    yield
    if "server" in request.fixturenames:
        server: Server = request.getfixturevalue("server")
        server.wait_until_idle()
        assert server.metric("vllm:kv_cache_usage_perc") == 0
