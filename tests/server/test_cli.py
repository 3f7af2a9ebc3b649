import os
import subprocess
import sys

import pytest
import yaml
from vllm_server import cli
from vllm_traits import BackendError, ConfigError, DeviceError, ModelError

HEAVY = (
    "torch",
    "pydantic",
    "starlette",
    "uvicorn",
    "jinja2",
    "tokenizers",
    "rich",
    "yaml",
    "numpy",
)
PROG = {"vllm-lite": "main", "vllm-lite-server": "server_main"}


def run(prog, *words, **environ):
    """The command in a process of its own, as the installed script would start it."""
    code = f"import sys; from vllm_server.cli import {PROG[prog]} as m; sys.exit(m())"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=100,
        env=kept | environ,
    )


@pytest.fixture
def ran(monkeypatch):
    """Which command would run, without running it."""
    calls = []
    monkeypatch.setattr(cli, "_guarded", lambda name, words: calls.append((name, words)) or 0)
    return calls


@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (cli.server_main, [], ("serve", [])),
        (cli.server_main, ["--port", "1"], ("serve", ["--port", "1"])),
        (cli.server_main, ["chat", "--system", "x"], ("chat", ["--system", "x"])),
        (cli.main, ["serve", "--cpu"], ("serve", ["--cpu"])),
        (cli.main, ["--server", "--m", "x"], ("serve", ["--server", "--m", "x"])),
        (cli.main, ["--m", "x", "--i"], ("chat", ["--m", "x", "--i"])),
        (cli.main, ["--prompts", "a | b"], ("completion", ["--prompts", "a | b"])),
        (cli.main, ["--prompts=a | b"], ("completion", ["--prompts=a | b"])),
        (cli.main, ["--w", "d", "--batch", "4"], ("completion", ["--w", "d", "--batch", "4"])),
        (cli.main, ["bench", "serve"], ("bench", ["serve"])),
    ],
)
def test_words_choose_a_command(ran, main, words, expected):
    assert main(words) == 0
    assert ran == [expected]


def test_help_version_and_unknown_commands(ran, capsys):
    assert cli.main([]) == 0
    assert "completion" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vllm-lite 0.")
    assert cli.main(["sevre"]) == 2
    assert "did you mean serve?\n" in capsys.readouterr().err
    assert cli.server_main(["run-batch"]) == 2
    assert ran == []


@pytest.mark.parametrize(
    "words", [[], ["serve"], ["chat"], ["completion"], ["generate"], ["bench", "serve"], ["bench"]]
)
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from vllm_server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, timeout=100
    )
    assert done.stderr == "[]\n"
    assert "usage: vllm-lite" in done.stdout


def test_a_configuration_error_imports_nothing_heavy_either():
    code = (
        "import sys; from vllm_server.cli import main\n"
        "assert main(['serve', '--prot', '1']) == 2\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("bad setting"), 2),
        (ModelError("bad model"), 3),
        (DeviceError("bad device"), 4),
        (BackendError("bad luck"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_class_of_error_has_its_exit_code_and_one_line(monkeypatch, capsys, error, code):
    class Module:
        @staticmethod
        def run(argv):
            raise error

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(cli, "import_module", lambda name: Module)
    assert cli.run_command("serve", []) == code
    said = capsys.readouterr().err
    assert said == ("" if code == 130 else f"vllm-lite: error: {error}\n")


def test_what_nobody_expected_is_one_line_and_a_traceback_only_on_request():
    code = (
        "import sys; from vllm_server import cli, logs\n"
        "logs.setup(sys.argv[1])\n"
        "cli.import_module = lambda name: 1 / 0\n"
        "sys.exit(cli.run_command('serve', []))"
    )
    for level, traceback in (("info", False), ("debug", True)):
        done = subprocess.run(
            [sys.executable, "-c", code, level], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is traceback
        assert "ZeroDivisionError" in done.stderr


def test_print_config_shows_values_and_origins_and_hides_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("server: {port: 7001}\nengine: {max_num_seqs: 3}\n")
    done = run(
        *("vllm-lite-server", "-c", str(path), "--print-config", "--host", "127.0.0.1"),
        VLLM_PORT="7002",
        VLLM_API_KEY="sesame",
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["server"]["port"] == 7002 and shown["engine"]["max_num_seqs"] == 3
    assert "port: 7002  # environment VLLM_PORT" in done.stdout
    assert "sesame" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["serve", "chat", "completion", "generate"])
def test_every_command_that_needs_a_model_takes_the_settings(command):
    done = run("vllm-lite", command, "--print-config", "--max-model-len", "4K")
    assert "max_model_len: 4096  # flag --max-model-len" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["serve", "--draft-model", "x"], 2, "Speculation with a draft model is not available"),
        (["serve", "--tensor-parallel-size", "2"], 2, "Tensor parallelism is not available"),
        (["serve", "--config", "missing.yaml"], 2, "Cannot read the configuration file"),
        (["serve", "--hardened", "--host", "0.0.0.0"], 2, "only with keys"),
        (["serve", "--port", "70000"], 2, "at most 65535"),
        (["bench", "serf"], 2, "did you mean serve?\n"),
        (["bench", "serve", "--url", "ftp://x"], 2, "not an http or https URL"),
        (["bench", "serve", "--goodput", "speed:1"], 2, "a goal is ttft:MS"),
        (["bench", "serve", "--num-prompts", "0"], 2, "at least 1"),
        (["bench", "serve", "--endpoint", "embeddings"], 2, "one of completions, chat"),
        (["bench", "serve", "--request-rate", "0"], 2, "must be positive"),
        (["bench", "serve", "--spread", "2"], 2, "between 0 and 1"),
        (["generate", "x", "--model", "no-such-folder"], 3, "neither an existing folder"),
        (["generate", "x", "--model", "a.gguf"], 3, "has no file 'a.gguf'"),
    ],
)
def test_errors_say_what_is_wrong_in_one_line(words, code, message):
    done = run("vllm-lite", *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("vllm-lite: error: ") == 1


def test_a_reader_that_leaves_early_is_no_error():
    code = "from vllm_server.cli import main; raise SystemExit(main(['serve', '--print-config']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr as said:
        assert said.read() == ""
    assert process.wait(100) == 0


def test_installed_scripts_are_the_two_mains():
    from importlib.metadata import entry_points

    scripts = {e.name: e.value for e in entry_points(group="console_scripts")}
    assert scripts["vllm-lite"] == "vllm_server.cli:main"
    assert scripts["vllm-lite-server"] == "vllm_server.cli:server_main"


@pytest.mark.parametrize(
    ("words", "beginning", "code"),
    [
        (["--json-schema"], "{", 0),
        (["--markdown"], "# Configuration", 0),
        (["--example"], "# Every setting", 0),
        ([], "usage:", 2),
    ],
)
def test_files_made_from_the_schema_are_written_to_stdout(words, beginning, code):
    done = subprocess.run(
        [sys.executable, "-m", "vllm_server.config", *words],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code
    assert done.stdout.startswith(beginning)
