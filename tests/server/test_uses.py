"""Which command takes which flags: the command line takes what acts, and refuses the rest."""

import re

import pytest
import yaml
from vllm_server.cli import COMMANDS, run_command
from vllm_server.config.fields import all_fields
from vllm_server.config.flags import FlagParser
from vllm_server.config.uses import USES, summary
from vllm_traits import ConfigError

pytestmark = pytest.mark.usefixtures("restored_process")

COLUMNS = "serve chat completion generate tokenize info quantize throughput latency"
# x is taken, . is refused.
TABLE = """
    --log-level debug          x x x x x x x x x
    --log warn                 x x x x x x x x x
    --log-format json          x x x x x x x x x
    --port 9                   x . . . . . . . .
    -p9                        x . . . . . . . .
    --host=127.0.0.1           x . . . . . . . .
    --hardened                 x . . . . . . . .
    --no-hardened              x . . . . . . . .
    --disable-shutdown-endpoint x . . . . . . . .
    --served-model-name a      x . . . . . . . .
    --max_num_queued_reqs 3    x . . . . . . . .
    --admin-key sesame         x . . . . . . . .
    --rate-limit-requests 5    x . . . . . . . .
    --share-prefix-cache       x . . . . . . . .
    --context-cache            x x . . . . . . .
    --max-tokens 4             x x x x . . . . .
    --temperature 0            x x x x . . . . .
    --penalty 1.1              x x x x . . . . .
    --top-k -1                 x x x x . . . . .
    --seed 3                   x x x x . . . . .
    --max-num-seqs 3           x x x x . . . x x
    --max-requests 3           x x x x . . . x x
    --kv-fraction 0.5          x x x x . . . x x
    --no-prefix-cache          x x x x . . . x x
    --speculation ngram        x x x x . . . x x
    --isq q4k                  x x x x . . . x x
    --quant q4k                x x x x . . . x x
    --self-check               x x x x . . . x x
    --num-threads 1            x x x x . . . x x
    --cpu                      x x x x . x . x x
    --dtype f32                x x x x . x . x x
    --kv-quantization          x x x x . x . x x
    --m builtin                x x x x x x . x x
    --w folder                 x x x x x x . x x
    --gguf-file a.gguf         x x x x x x . x x
    --f a.gguf                 x x x x x x . x x
    --revision main            x x x x x x x x x
    --offline                  x x x x x x x x x
"""
CASES = [
    (line[:31].split(), column, mark)
    for line in TABLE.strip("\n").splitlines()
    for column, mark in zip(COLUMNS.split(), line[31:].split(), strict=True)
]
WORDS = {
    "quantize": ["quantize", "folder", "small.gguf", "--type", "q8_0"],
    "throughput": ["bench", "throughput"],
    "latency": ["bench", "latency"],
}


def run(column, *flags):
    """The exit code of a command that would only print its settings."""
    name, *own = WORDS.get(column, [column])
    try:
        return run_command(name, [*own, *flags, "--print-config"])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("flags", "column", "mark"), CASES, ids=lambda x: "".join(x))
def test_a_command_takes_the_flags_that_act_on_it_and_refuses_the_others(
    capsys, flags, column, mark
):
    code = run(column, *flags)
    said = capsys.readouterr()
    name = flags[0].partition("=")[0].replace("_", "-").replace("-p9", "-p")
    if mark == "x":
        assert code == 0, said.err
        assert re.search(rf"# flag {name}$", said.out, re.M)
        return
    assert code == 2
    command = f"bench {column}" if column in ("throughput", "latency") else column
    assert said.err.startswith(f"vllm-lite: error: flag {name} sets ")
    assert f"which `vllm-lite {command}` does not use; leave it out. It is for `" in said.err
    assert said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["completion", "--batch", "4", "--max-num-seqs", "9"], "with `--batch` does not use"),
        (["completion", "--batch", "4", "--max-requests", "4"], "leave one of the two out"),
        (["completion", "--raw", "--chat-template", "FILE"], "with `--raw` does not use"),
        (["generate", "a", "--chat-template", "FILE"], "leave it out or add `--chat`."),
        (["chat", "--api-key", "sesame"], "leave it out or add `--url`."),
        (["chat", "--url", "http://x", "--max-model-len", "9"], "with `--url` does not use"),
        (["chat", "--url", "http://x", "--no-context-cache"], "with `--url` does not use"),
        (["info", "builtin", "--model", "other"], "with `MODEL` does not use"),
        (["bench", "serve", "--max-num-seqs", "9"], "`vllm-lite bench serve` does not use"),
        (["bench", "serve", "--log-level", "debug"], "`vllm-lite bench serve` does not use"),
    ],
)
def test_a_flag_that_another_flag_makes_meaningless_is_refused(capsys, tmp_path, words, message):
    file = tmp_path / "template.jinja"
    file.write_text("")
    words = [str(file) if word == "FILE" else word for word in words]
    assert run_command(words[0], words[1:]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["completion", "--batch", "4", "--no-raw", "--chat-template", "FILE"],
        ["completion", "--max-num-seqs", "9", "--raw"],
        ["generate", "a", "--chat", "--chat-template", "FILE"],
        ["chat", "--url", "http://x", "--api-key", "sesame", "--m", "a", "--temperature", "0"],
        ["chat", "--url", "http://x", "--max-tokens", "3", "--log-level", "info"],
        ["info", "builtin", "--dtype", "f32", "--offline"],
        ["info", "--model", "builtin"],
    ],
)
def test_the_same_flags_are_taken_where_they_act(tmp_path, words):
    file = tmp_path / "template.jinja"
    file.write_text("")
    words = [str(file) if word == "FILE" else word for word in words]
    with pytest.raises(SystemExit) as end:
        run_command(words[0], [*words[1:], "--print-config"])
    assert end.value.code == 0


def test_own_flags_of_the_benchmark_come_before_settings_of_the_same_name(capsys):
    words = ["--model", "a", "--api-key", "b", "--temperature", "1", "--seed", "3"]
    assert run_command("bench", ["serve", *words, "--url", "ftp://x"]) == 2
    assert "not an http or https URL" in capsys.readouterr().err


@pytest.mark.parametrize("column", COLUMNS.split())
def test_files_and_variables_hold_settings_for_all_commands(capsys, monkeypatch, tmp_path, column):
    path = tmp_path / "config.yaml"
    path.write_text(
        "server: {port: 9, log_level: debug}\nsampling: {top_k: 3}\nauth: {api_keys: [k]}"
    )
    monkeypatch.setenv("VLLM_LITE_ENGINE_SHARE_PREFIX_CACHE", "true")
    monkeypatch.setenv("VLLM_PORT", "10")
    assert run(column, "--config", str(path)) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["server"]["log_level"] == "debug"
    assert shown["server"].get("port") == (10 if column == "serve" else None)


@pytest.mark.parametrize("use", USES.values(), ids=lambda use: use.command)
def test_help_lists_exactly_the_flags_a_command_takes(capsys, use):
    name, *own = use.command.split()
    with pytest.raises(SystemExit) as end:
        run_command(name, [*own, "--help"])
    assert end.value.code == 0
    listed = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", capsys.readouterr().out))
    of_its_own = {"--model", "--api-key", "--temperature", "--seed"} if own == ["serve"] else set()
    for field in all_fields():
        if field.flags[0] not in of_its_own:
            assert (field.flags[0] in listed) is (field.path in use.paths), field.path


def test_serve_takes_every_setting_and_every_command_has_a_row():
    assert set(USES["serve"].fields) == set(all_fields())
    assert {command.split()[0] for command in USES} == set(COMMANDS)
    for use in USES.values():
        assert use.paths <= USES["serve"].paths
        for mode in use.modes:
            assert mode.unused < use.paths, "a mode that refuses nothing says nothing"


def test_an_unknown_flag_is_told_of_one_that_the_command_takes():
    with pytest.raises(ConfigError, match=r"^Unknown flag --prot\.$"):
        FlagParser("quantize", "").parse(["--prot", "9"])
    with pytest.raises(ConfigError, match=r"^Unknown flag --modl; did you mean --model\?$"):
        FlagParser("tokenize", "").parse(["--modl", "9"])


def test_a_summary_names_sections_or_keys_whichever_is_shorter():
    sampling = {field.path for field in all_fields() if field.section == "sampling"}
    assert summary(sampling) == "all of `sampling`"
    assert summary(sampling - {"sampling.seed"}) == "`sampling` without `seed`"
    assert summary({"engine.model", "auth.api_keys"}) == "`engine.model`; `auth.api_keys`"
    assert summary(()) == "none"
