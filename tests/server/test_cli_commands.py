"""The commands that answer in the terminal, over the embedded model."""

import asyncio
import builtins
import io
import json
import re
import sys
import threading
from dataclasses import replace

import httpx
import pytest
import uvicorn
from vllm_models.options import ignore_progress
from vllm_server import launch
from vllm_server.app import create_app
from vllm_server.cli import chat, run_command
from vllm_server.cli.remote import RemoteTalker
from vllm_server.cli.talk import LocalTalker, Turn
from vllm_server.config import EngineSettings, ServerSettings, Settings
from vllm_server.local import Account, LocalEngine
from vllm_server.ops.http_protocol import uvicorn_config
from vllm_server.service import ServerState
from vllm_server.summary import summary
from vllm_traits import InvalidRequestError

pytestmark = pytest.mark.usefixtures("restored_process")

ENGINE = EngineSettings(max_model_len=256, num_kv_blocks=256, num_threads=1, dtype="f32")
SETTINGS = Settings(engine=replace(ENGINE, context_cache=True))
FLAGS = ("--max-model-len=256", "--num-kv-blocks=256", "--num-threads=1", "--dtype=f32")


@pytest.fixture(scope="module")
def engine():
    with LocalEngine.load(SETTINGS, ignore_progress) as engine:
        yield engine


def stdin(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# -- generate -------------------------------------------------------------------------------------


def generate(capsys, *words):
    assert run_command("generate", [*words, *FLAGS, "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_generate_takes_its_prompt_from_argument_flag_or_stdin(capsys, monkeypatch):
    text = generate(capsys, "Once upon a time", "--max-tokens", "8")
    assert text.endswith("\n") and text.strip()
    assert generate(capsys, "--prompt", "Once upon a time", "--max-tokens=8") == text
    stdin(monkeypatch, "Once upon a time")
    assert generate(capsys, "--max-tokens=8") == text
    stdin(monkeypatch, "Once upon a time")
    assert generate(capsys, "-", "--max-tokens=8") == text


def test_generate_prints_text_only_and_uses_the_template_on_request(capsys):
    answer = generate(capsys, "--chat", "What is vllm-lite?", "--max-tokens", "24")
    assert "vllm-lite" in answer
    assert "INFO" not in answer


def test_generate_wants_one_prompt(capsys, monkeypatch):
    assert run_command("generate", ["a", "--prompt", "b"]) == 2
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})()
    )
    assert run_command("generate", []) == 2
    said = capsys.readouterr().err
    assert "Give the prompt once" in said and "Give a prompt" in said


# -- completion -----------------------------------------------------------------------------------


def test_completion_answers_in_order_and_ends_with_right_sums(capsys):
    words = ["--prompts", "What is vllm-lite? | Hello |", "--max-tokens", "6", *FLAGS]
    assert run_command("completion", words) == 0
    out = capsys.readouterr().out
    assert out.index("[1] What is vllm-lite?") < out.index("[2] Hello")
    prompt, decoded = re.findall(r"^(?:Prompt|Decoded) tokens: +(\d+) in [\d.]+ s \(", out, re.M)
    assert 2 <= int(decoded) <= 12 and int(prompt) > 10


def test_completion_in_a_batch_is_muted_and_runs_all_at_once(capsys, monkeypatch):
    words = ["--batch", "6", "--prompts", "Hello | ignored", "--max-tokens", "5", *FLAGS]
    monkeypatch.setenv("VLLM_LITE_ENGINE_MAX_NUM_SEQS", "1")
    assert run_command("completion", words) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 2, "two lines of summary"
    alone = ["--prompts", "Hello", "--max-tokens", "5", *FLAGS]
    assert run_command("completion", alone) == 0
    (one,) = re.findall(r"Prompt tokens: +(\d+)", capsys.readouterr().out)
    assert re.search(rf"Prompt tokens: +{6 * int(one)} in", out)


def test_completion_without_text_is_refused(capsys):
    assert run_command("completion", ["--prompts", " | "]) == 2
    assert run_command("completion", ["--batch", "0"]) == 2
    assert "has no text" in capsys.readouterr().err


def test_the_summary_divides_tokens_by_the_time_they_took():
    a = Account(10, num_tokens=4, started=100.0, first_token=101.0, ended=103.0)
    b = Account(20, num_tokens=8, started=100.5, first_token=102.0, ended=105.0)
    assert summary([a, b]).splitlines() == [
        "Prompt tokens:  30 in 2.00 s (15.00 tokens/s)",
        "Decoded tokens: 12 in 4.00 s (3.00 tokens/s)",
    ]


# -- chat -----------------------------------------------------------------------------------------


def test_chat_answers_line_by_line_and_shows_what_is_left(capsys, monkeypatch):
    stdin(monkeypatch, "What is vllm-lite?\n\nThanks!\n")
    assert run_command("chat", [*FLAGS, "--temperature", "0", "--max-tokens", "20"]) == 0
    done = capsys.readouterr()
    assert "vllm-lite" in done.out
    turns = re.findall(r"\[(\d+) tokens left, (\d+) cached, [\d.]+ tok/s\]", done.err)
    assert len(turns) == 2
    assert int(turns[1][0]) < int(turns[0][0]) < 256
    assert int(turns[1][1]) > 0, "the second turn finds the first one cached"


def test_chat_remembers_the_last_turns(engine):
    talker = LocalTalker(engine, "s", max_tokens=8)
    seen = []
    answer = talker.answer
    talker.answer = lambda messages: seen.append(messages) or answer(messages)
    conversation = chat.Conversation(talker, "Be brief.")
    conversation._turn("Hello")
    conversation._turn("And now?")
    assert [m["role"] for m in seen[1]] == ["system", "user", "assistant", "user"]
    assert seen[1][1]["content"] == "Hello"


class Script:
    """A talker whose answers, and interruptions, a test chooses."""

    def __init__(self, *pieces):
        self.pieces, self.turn, self.seen, self.closed = pieces, Turn(), [], 0

    def answer(self, messages):
        self.seen.append(messages)
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1


def typed(monkeypatch, *lines):
    waiting = list(lines)

    def read(prompt=""):
        line = waiting.pop(0) if waiting else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    return waiting


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(monkeypatch, capsys):
    typed(monkeypatch, "first", "second")
    talker = Script("half", KeyboardInterrupt())
    chat.Conversation(talker, None).run()
    assert talker.closed == 2
    assert talker.seen[1][1] == {"role": "assistant", "content": "half"}
    assert "[stopped]" in capsys.readouterr().err


def test_an_interrupt_at_the_prompt_clears_the_history_and_the_next_one_exits(monkeypatch, capsys):
    left = typed(
        monkeypatch, "first", KeyboardInterrupt(), "second", KeyboardInterrupt(),
        KeyboardInterrupt(), "never",
    )  # fmt: skip
    talker = Script("answer")
    chat.Conversation(talker, "system").run()
    assert [m["role"] for m in talker.seen[1]] == ["system", "user"]
    assert left == ["never"]
    assert "history is cleared" in capsys.readouterr().err


def test_a_refused_turn_is_told_and_forgotten(monkeypatch, capsys):
    typed(monkeypatch, "first", "second")
    talker = Script(InvalidRequestError("too long"))
    chat.Conversation(talker, None).run()
    assert len(talker.seen[1]) == 1
    assert capsys.readouterr().err.count("too long") == 2


@pytest.fixture(scope="module")
def url(engine):
    """The same engine behind HTTP, on a loop of its own."""
    state = ServerState(replace(SETTINGS, server=ServerSettings(host="127.0.0.1")))
    state.complete(launch.make_service(SETTINGS, engine.model, engine._engine))
    server = uvicorn.Server(uvicorn_config(create_app(state), state.settings.server, port=0))
    thread = threading.Thread(target=asyncio.run, args=(server.serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    state.close()


def test_chat_with_a_running_server_streams_and_shows_the_same_figures(url, engine):
    talker = RemoteTalker(url, None, None, "session-1", {})
    messages = [{"role": "user", "content": "What is vllm-lite?"}]
    assert talker.turn.tokens_left == 256
    text = "".join(talker.answer(messages))
    assert "vllm-lite" in text
    left = talker.turn.tokens_left
    assert 0 < left < 256 and talker.turn.rate > 0
    "".join(talker.answer([*messages, {"role": "assistant", "content": text}, *messages]))
    assert talker.turn.cached_tokens > 0 and talker.turn.tokens_left < left


def test_chat_with_a_running_server_sends_the_settings_that_say_something(url, capsys, monkeypatch):
    def ask(*words):
        stdin(monkeypatch, "What is vllm-lite?\n")
        assert run_command("chat", ["--url", url, *words]) == 0
        return capsys.readouterr()

    greedy = ask("--temperature", "0", "--max-tokens", "5")
    assert ask("--temperature", "0", "--max-tokens", "5").out == greedy.out
    hot = ("--temperature", "2", "--max-tokens", "5")
    assert ask(*hot, "--seed", "1").out == ask(*hot, "--seed", "1").out != ask(*hot).out
    (left,) = re.findall(r"\[(\d+) tokens left", greedy.err)
    (more,) = re.findall(r"\[(\d+) tokens left", ask("--temperature=0", "--max-tokens=2").err)
    assert int(more) - int(left) == 3


def test_leaving_an_answer_of_a_server_aborts_it_there(url, engine):
    talker = RemoteTalker(url, None, None, "session-2", {})
    answer = talker.answer([{"role": "user", "content": "Tell a long story."}])
    next(answer)
    answer.close()
    assert asyncio.run(engine._engine.drain(60))


def test_errors_of_a_server_are_told_with_its_own_words(url):
    talker = RemoteTalker(url, None, None, "session-3", {})
    with pytest.raises(InvalidRequestError, match="maximum context length is 256"):
        list(talker.answer([{"role": "user", "content": "word " * 999}]))
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "http://127.0.0.1:1"], "Cannot reach"),
        (["--url", "ftp://x"], "not an http or https URL"),
    ],
)
def test_a_server_that_is_not_there_is_told(capsys, words, message):
    assert run_command("chat", words) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_the_server_does_not_have_is_told(capsys, url):
    assert run_command("chat", ["--url", url, "--model", "other/model"]) == 2
    assert "does not serve other/model" in capsys.readouterr().err


# -- bench ----------------------------------------------------------------------------------------


def test_bench_serve_measures_a_running_server(url, tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["serve", "--url", url, "--num-prompts", "6", "--input-len", "12", "--output-len", "5"]
    goals = ["--goodput", "ttft:60000", "e2e:60000"]
    for endpoint, bounds in (("completions", ["--max-concurrency", "2"]), ("chat", [])):
        more = ["--endpoint", endpoint, "--output-json", str(file), *bounds]
        assert run_command("bench", [*words, *more, *goals]) == 0
        figures = json.loads(file.read_text())
        assert figures["completed"] == 6 and figures["failed"] == 0, figures["errors"]
        assert figures["output_tokens"] == 30
        assert figures["goodput_requests_per_second"] == figures["requests_per_second"]
        assert "TTFT" in capsys.readouterr().out
    assert figures["prompt_tokens"] > 72, "words and the template"


def test_bench_serve_fails_if_every_request_does(url, capsys):
    words = ["serve", "--url", url, "--num-prompts", "2", "--input-len", "999"]
    assert run_command("bench", words) == 1
    assert "error http_400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "num_requests"), [(["throughput"], 5), (["latency", "--num-iters", "3"], 15)]
)
def test_bench_offline_runs_the_engine_alone(words, num_requests, tmp_path, capsys):
    file = tmp_path / "figures.json"
    size = ("--num-prompts", "5", "--input-len", "9", "--output-len", "4")
    assert run_command("bench", [*words, *size, "--output-json", str(file), *FLAGS]) == 0
    figures = json.loads(file.read_text())
    assert figures["completed"] == num_requests
    assert figures["output_tokens"] == 4 * num_requests
    assert figures["prompt_tokens"] == 9 * num_requests
    assert figures["setting"]["kind"] == words[0]
    assert figures["output_tokens_per_second"] > 0
