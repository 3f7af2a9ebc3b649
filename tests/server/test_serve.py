"""The server as a process of its own: its end, signals, sockets and exit codes."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

PATIENCE = 60.0
PROGRAM = str(Path(sys.executable).with_name("vllm-lite-server"))
SMALL = ("--max-model-len", "2048", "--num-kv-blocks", "512", "--num-threads", "1")


class Process:
    """A server process and its log."""

    def __init__(self, log: Path, *flags: str, command=(PROGRAM,), **environ: str):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "HF_"))}
        words = [*command, "--host", "127.0.0.1", "--port", "0", *flags]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=file, env=kept | environ)

    def wait_for(self, pattern: str) -> re.Match:
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None or re.search(pattern, self.log.read_text()), (
                f"exit {self.process.returncode}:\n{self.log.read_text()}"
            )
            time.sleep(0.02)
        return found

    def ready(self) -> httpx.Client:
        url = self.wait_for(r"Listening on (http://\S+)")[1]
        return httpx.Client(base_url=url, timeout=PATIENCE)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path):
    """Starts processes and ends those that are left."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, **more) -> Process:
            process = Process(tmp_path / "log.txt", *flags, **more)
            stack.callback(process.process.wait)
            stack.callback(process.process.kill)
            return process

        yield start


LONG = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True, "temperature": 0}


@contextlib.contextmanager
def long_stream(client, **more):
    """A stream that has begun, as an iterator over its events."""
    with client.stream("POST", "/v1/completions", json=LONG | more) as response:
        lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        next(lines)
        yield lines


def until_draining(client) -> httpx.Response:
    deadline = time.monotonic() + PATIENCE
    while (answer := client.get("/health/ready")).status_code != 503:
        assert time.monotonic() < deadline
    return answer


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "shutdown"])
def test_the_end_refuses_new_work_lets_streams_finish_and_exits_with_0(start, how):
    process = start(*SMALL)
    with process.ready() as client, long_stream(client, max_tokens=800) as events:
        if how == "shutdown":
            assert client.post("/shutdown").status_code == 202
        else:
            process.signal(getattr(signal, how))
        assert until_draining(client).json()["status"] == "draining"
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        last = list(events)
        assert last[-1] == "[DONE]"
        assert json.loads(last[-2])["choices"][0]["finish_reason"] == "length"
    assert process.end() == 0
    assert "Draining 1 requests" in process.log.read_text()
    assert "Traceback" not in process.log.read_text()


def test_streams_that_outlast_the_grace_period_end_with_an_error_event(start):
    process = start(*SMALL, "--shutdown-timeout", "0")
    with process.ready() as client, long_stream(client) as events:
        process.signal(signal.SIGTERM)
        last = list(events)
        assert "error" in json.loads(last[-2] if last[-1] == "[DONE]" else last[-1])
    assert process.end() == 0
    assert "Cutting off 1 requests" in process.log.read_text()


def test_a_second_interrupt_cuts_off_at_once_and_exits_with_130(start):
    process = start(*SMALL)
    with process.ready() as client, long_stream(client) as events:
        process.signal(signal.SIGINT)
        until_draining(client)
        process.signal(signal.SIGINT)
        assert len(list(events)) < 1500
    assert process.end() == 130


def test_an_end_during_loading_is_prompt_and_health_says_loading(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        uds = str(tmp_path / "socket")
        process = start("--uds", uds, "--model", "a/b", HF_ENDPOINT=endpoint)
        connection, _ = silent_hub.accept()
        with connection, httpx.Client(transport=httpx.HTTPTransport(uds=uds)) as client:
            answer = client.get("http://localhost/health", timeout=PATIENCE)
            assert answer.status_code == 503
            assert answer.json()["status"] == "loading" and answer.json()["progress"] < 1
            assert client.get("http://localhost/health/live", timeout=PATIENCE).status_code == 200
            process.signal(signal.SIGTERM)
            assert process.end() == 0
    assert not Path(uds).exists()


def test_a_unix_socket_serves_and_is_removed_at_the_end(start, tmp_path):
    uds = str(tmp_path / "socket")
    process = start(*SMALL, "--uds", uds)
    process.wait_for("Listening on unix:")
    with httpx.Client(transport=httpx.HTTPTransport(uds=uds)) as client:
        assert client.get("http://localhost/health").status_code == 200
    process.signal(signal.SIGTERM)
    assert process.end() == 0
    assert not Path(uds).exists()


def test_sighup_reads_the_key_file_again(start, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first-key\n")
    process = start(*SMALL, "--api-key-file", str(keys))
    with process.ready() as client:

        def status(key):
            return client.get("/v1/models", headers={"x-api-key": key}).status_code

        assert (status("first-key"), status("second-key")) == (200, 401)
        keys.write_text("second-key\n")
        process.signal(signal.SIGHUP)
        process.wait_for("Read the API keys again")
        assert (status("first-key"), status("second-key")) == (401, 200)
        keys.unlink()
        process.signal(signal.SIGHUP)
        process.wait_for("The API keys stay as they are")
        assert status("second-key") == 200
    process.signal(signal.SIGTERM)
    assert process.end() == 0


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model", "no-such-folder"], 3, "neither an existing folder"),
        (["--max-model-len", "1000000"], 2, "max_model_len"),
        (["--num-kv-blocks", "16000000"], 4, "blocks"),
        (["--device", "cuda"], 4, "this machine has none"),
    ],
)
def test_a_model_that_cannot_be_served_ends_the_process_with_its_code(start, flags, code, message):
    process = start(*flags, CUDA_VISIBLE_DEVICES="")
    assert process.end() == code
    said = process.log.read_text()
    assert said.count("vllm-lite: error: ") == 1
    assert message in said.partition("vllm-lite: error: ")[2]
    assert "Traceback" not in said


def test_a_port_in_use_ends_the_process_before_anything_is_loaded(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--port", str(taken.getsockname()[1]), "--model", "no-such-folder")
        assert process.end() == 2
        assert "another process does" in process.log.read_text()


BREAKING = """
import sys
import vllm_server.serve as serve
from vllm_core import AsyncEngine
from vllm_core.testing import FakeBackend
from vllm_traits import BackendError

class Broken(FakeBackend):
    def forward(self, batch):
        raise BackendError("the device is gone")

def start_engine(model):
    engine = AsyncEngine(Broken(info=model.backend.info))
    engine.start()
    return engine

serve.start_engine = start_engine
from vllm_server.cli import server_main
sys.exit(server_main())
"""


def test_an_engine_that_dies_fails_its_requests_and_ends_the_process(start, tmp_path):
    program = tmp_path / "breaking.py"
    program.write_text(BREAKING)
    process = start(*SMALL, command=(sys.executable, str(program)))
    with process.ready() as client:
        for _ in range(2):  # the first failure could have been the request's fault
            answer = client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 4})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_unavailable"
    assert process.end() == 1
    assert "the device is gone" in process.log.read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a Linux signal")
def test_sigterm_to_hatch_leaves_no_orphan(start, tmp_path):
    """Here a launcher of that name, which like hatch runs a shell and passes no signal on."""
    hatch = tmp_path / "hatch"
    hatch.write_text(
        textwrap.dedent(
            f"""\
            import shlex, subprocess, sys
            subprocess.run("exec {PROGRAM} " + shlex.join(sys.argv[1:]), shell=True)
            """
        )
    )
    process = start(*SMALL, command=(sys.executable, str(hatch)))
    with process.ready() as client:
        address = client.base_url.host, client.base_url.port
    process.signal(signal.SIGTERM)
    assert process.end() == -signal.SIGTERM
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(address).close()
            time.sleep(0.02)
        raise AssertionError(f"the server outlives its launcher:\n{process.log.read_text()}")
