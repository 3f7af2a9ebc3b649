"""From settings to a model, a socket and a process; the process is a real one."""

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

import gguf
import httpx
import pytest
from vllm_core import SchedulerConfig
from vllm_models import BackendOptions
from vllm_models.options import LoadProgress
from vllm_server import launch, progress
from vllm_server.banner import banner, exposure_warning
from vllm_server.config import EngineSettings, SamplingSettings, ServerSettings, Settings, load
from vllm_server.config.flags import FlagParser
from vllm_server.listen import addresses, open_socket
from vllm_server.self_check import Findings
from vllm_traits import ConfigError, ModelError

PATIENCE = 60.0
PROGRAM = str(Path(sys.executable).with_name("vllm-lite-server"))
SMALL = ("--max-model-len", "2048", "--num-kv-blocks", "512", "--num-threads", "1")


def settings(*words: str) -> Settings:
    return load(FlagParser("test", "").parse(words)[1], environ={}).settings


# -- from settings to the parts -------------------------------------------------------------------


def test_nothing_heavy_is_imported_before_the_server_answers():
    code = "import sys, vllm_server.serve, vllm_server.local; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ("vllm-lite-demo",)),
        (["--model", "Qwen/Qwen3-0.6B"], ("Qwen/Qwen3-0.6B",)),
        (["--w", "."], (Path.cwd().name,)),
        (["--model", "some/where/tiny-Q4_K_M.gguf"], ("tiny-Q4_K_M",)),
        (["--f", "tiny-00001-of-00002.gguf"], ("tiny",)),
        (["--w", ".", "--f", "tiny.gguf"], ("tiny",)),
        (["--m", "own/model", "--f", "tiny.gguf"], ("own/model",)),
        (["--served-model-name", "a", "--served-model-name", "b"], ("a", "b")),
    ],
)
def test_the_model_is_called_as_the_operator_says_or_as_it_was_named(words, names):
    assert launch.model_names(settings(*words)) == names


def test_defaults_depend_on_the_device_and_explicit_values_win():
    assert launch.backend_options(settings("--cpu").engine, Path()) == BackendOptions(
        model=Path(), device="cpu", block_size=16, max_sequences=32, max_batch_tokens=512
    )
    words = (
        *("--cpu", "--block-size", "32", "--max-num-seqs", "3", "--num-kv-blocks", "9"),
        *("--max-num-batched-tokens", "64", "--max-model-len", "100", "--dtype", "half"),
        *("--gpu-memory-utilization", "0.5", "--kv-cache-memory", "1M"),
    )
    assert launch.backend_options(settings(*words).engine, Path()) == BackendOptions(
        model=Path(),
        dtype="half",
        device="cpu",
        num_blocks=9,
        block_size=32,
        memory_fraction=0.5,
        kv_cache_memory=1 << 20,
        max_model_len=100,
        max_sequences=3,
        max_batch_tokens=64,
    )


def test_the_scheduler_gets_its_share_of_the_settings():
    assert launch.scheduler_config(settings()) == SchedulerConfig()
    words = (
        *("--scheduling-policy", "priority", "--max-num-queued-reqs", "7", "--no-overlap"),
        *("--no-prefix-cache", "--speculation", "ngram", "--num-speculative-tokens", "5"),
    )
    assert launch.scheduler_config(settings(*words)) == SchedulerConfig(
        policy="priority", max_waiting=7, overlap=False, prefix_cache=False, num_ngram_drafts=5
    )


def test_no_drafts_means_no_speculation():
    words = ("--speculation", "ngram", "--max-draft-tokens", "0")
    assert launch.scheduler_config(settings(*words)).num_ngram_drafts == 0


def test_the_operators_sampling_wins_over_the_models_own(tmp_path):
    ours = SamplingSettings(top_k=3)
    assert launch.sampling_defaults(ours, tmp_path) == ours
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": "x", "min_p": True}))
    found = launch.sampling_defaults(ours, tmp_path)
    assert found == SamplingSettings(temperature=0.6, top_k=3)
    file.write_text("[")
    with pytest.raises(ModelError, match=r"generation_config\.json is not a JSON object"):
        launch.sampling_defaults(SamplingSettings(), tmp_path)


def test_a_gguf_file_recommends_sampling_in_its_metadata(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_float32("general.sampling.temp", 0.5)
    writer.add_int32("general.sampling.top_k", 20)
    writer.add_string("general.sampling.top_p", "high")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = launch.sampling_defaults(SamplingSettings(top_k=3), tmp_path / "tiny.gguf")
    assert found == SamplingSettings(temperature=0.5, top_k=3)


def test_a_file_is_found_beside_others_or_by_its_path(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"")
    for words in (["--f", file], ["--w", tmp_path, "--f", "tiny.gguf"], ["--m", file]):
        assert launch.find_model(settings(*map(str, words)).engine) == file
    assert launch.find_model(settings("--f", "other.gguf").engine, str(file)) == file


def test_the_token_file_wins_over_the_token(tmp_path):
    file = tmp_path / "token"
    file.write_text("hf_file\n")
    assert launch.hub_token(EngineSettings(hf_token="hf_env")) == "hf_env"
    assert launch.hub_token(EngineSettings(hf_token="x", hf_token_path=str(file))) == "hf_file"


# -- sockets --------------------------------------------------------------------------------------


def test_port_0_becomes_a_free_port_that_is_shown():
    server = ServerSettings(host="127.0.0.1", port=0)
    with open_socket(server) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert addresses(server, listener) == [f"http://127.0.0.1:{port}"]


def test_an_address_that_means_all_is_shown_as_ones_that_can_be_called():
    server = ServerSettings(host="0.0.0.0", port=0)
    with open_socket(server) as listener:
        assert addresses(server, listener)[0].startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("host", "message"),
    [("192.0.2.7", "does not have that address"), ("no host", "is no address of a machine")],
)
def test_an_address_that_is_not_ours_is_refused(host, message):
    with pytest.raises(ConfigError, match=message):
        open_socket(ServerSettings(host=host, port=0))


def test_a_port_in_use_is_refused_with_what_to_do():
    with open_socket(ServerSettings(host="127.0.0.1", port=0)) as listener:
        taken = ServerSettings(host="127.0.0.1", port=listener.getsockname()[1])
        with pytest.raises(ConfigError, match=r"another process does.*--port 0"):
            open_socket(taken)


def test_a_socket_file_in_use_is_refused_and_a_left_over_makes_room(tmp_path):
    server = ServerSettings(uds=str(tmp_path / "s"))
    with open_socket(server) as listener:
        assert addresses(server, listener) == [f"unix:{server.uds}"]
        with pytest.raises(ConfigError, match="it is in use"):
            open_socket(server)
    with open_socket(server):
        pass
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="it is in use"):
        open_socket(ServerSettings(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"


# -- what is said ---------------------------------------------------------------------------------


class Memory:
    weight_bytes, dtype, device, max_model_len = 3 << 20, "bfloat16", "cpu", 512
    num_blocks, block_size, num_tokens, kv_bytes, max_concurrency = 64, 16, 1024, 5 << 20, 2.0
    kv_dtype = "bfloat16"


def test_the_banner_has_every_figure_of_the_start():
    told = "\n".join(
        banner(
            *(settings(), "demo", Memory(), Findings()),
            *({"load": 1.0, "warm-up": 0.25}, ["http://h:1"]),
        )
    )
    for part in (
        "serves demo",
        "demonstration model",
        "--model PATH_OR_HUB_ID",
        "3.0 MB of weights, bfloat16 on cpu",
        "64 blocks x 16 tokens = 1024 tokens of bfloat16, 5.0 MB; 2.0 sequences of full length",
        "Results do not depend on the batch",
        "1.25 s (load 1.00 s, warm-up 0.25 s)",
        "http://h:1",
    ):
        assert part in told
    real = "\n".join(banner(settings("--model", "a/b"), "a/b", Memory(), Findings(), {}, []))
    assert "demonstration" not in real


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        ([], True),
        (["--host", "127.0.0.1"], False),
        (["--host", "::1"], False),
        (["--host", "localhost"], False),
        (["--uds", "/tmp/x"], False),
        (["--api-key", "k"], False),
    ],
)
def test_only_an_open_door_to_strangers_is_warned_about(words, warns):
    assert (exposure_warning(settings(*words)) is not None) is warns


def test_progress_is_a_line_per_tenth_and_times_belong_to_their_stage(caplog):
    watch = progress.Stopwatch(progress.ProgressLines())
    with caplog.at_level("INFO", "vllm_server"):
        for i in range(101):
            watch(LoadProgress("load", i / 100))
        watch(LoadProgress("warm-up", 1.0, "done"))
    watch.stop()
    assert len(caplog.messages) == 12
    assert list(watch.seconds) == ["import", "load", "warm-up"]


def test_progress_bars_leave_the_terminal_clean(capsys):
    with progress.ProgressBars(sys.stderr) as bars:
        bars(LoadProgress("load", 0.5, "a file"))
        bars(LoadProgress("load", 1.0))
    assert "Traceback" not in capsys.readouterr().err


# -- the process ----------------------------------------------------------------------------------


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
    if flags[0] == "--device" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a CUDA device")
    process = start(*flags)
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
