"""The README's commands and examples, run as they stand."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]["default"][
    "scripts"
]
BIN = Path(sys.executable).parent


def blocks(language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def expand(command: str) -> str:
    """What the environment's script behind `hatch run NAME ARGS` executes."""
    name, _, arguments = command.partition("hatch run ")[2].partition(" ")
    return re.sub(r"\{args(:[^}]*)?\}", lambda _: arguments, SCRIPTS[name])


def run(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{BIN}:/usr/bin:/bin", "NO_COLOR": "1", "HOME": "/nonexistent"}
    return subprocess.run(
        ["bash", "-c", command],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        **options,
    )


def test_every_hatch_script_of_the_readme_exists() -> None:
    named = set(re.findall(r"hatch run (\w+)", README))
    assert {"serve", "test", "generate", "chat"} <= named <= set(SCRIPTS)


def test_the_first_command_serves_and_sigterm_leaves_no_orphan() -> None:
    assert "python3 -m pip install hatch && hatch run serve\n" in README
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = expand(f"hatch run serve --port {port}")
    process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, env={"PATH": f"{BIN}:/bin"})
    try:
        wait_until_ready(f"http://127.0.0.1:{port}")
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not get ready")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_examples_answer(server: Any) -> None:
    examples = [block for block in blocks() if block.startswith("curl ")]
    assert examples
    for example in examples:
        done = run(example.replace("http://127.0.0.1:8000", server.url))
        assert done.returncode == 0, done.stderr
        assert "inference engine" in done.stdout, done.stdout


def test_the_generate_command_writes_a_completion() -> None:
    command = re.search(r'hatch run generate "[^"]+"', README)
    assert command is not None
    done = run(expand(command[0]))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5


def test_python_examples_run(server: Any) -> None:
    examples = blocks("python")
    assert examples
    for example in examples:
        source = example.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(
            [sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        assert done.stdout.strip(), example


def test_the_example_configuration_is_valid() -> None:
    done = run("vllm-lite-server --config config.example.yaml --print-config")
    assert done.returncode == 0, done.stderr
