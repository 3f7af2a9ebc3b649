"""The Python API over the embedded model."""

import subprocess
import sys

import pytest
import vllm_lite
from vllm_lite import Engine, EngineConfig, Message, SamplingParams
from vllm_lite.outputs import Done
from vllm_server.local import Piece, read_all
from vllm_traits import (
    BackendError,
    ConfigError,
    ContextLengthError,
    InvalidRequestError,
    ModelError,
)

SMALL = {"max_model_len": 256, "num_kv_blocks": 256, "num_threads": 1, "dtype": "f32"}
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def engine():
    with Engine(EngineConfig(context_cache=True, **SMALL)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left_running(request):
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine")._local._engine.snapshot().num_in_flight == 0


def ask(engine, text):
    return engine.apply_chat_template([Message("user", text)])


def test_the_exported_names_are_pinned():
    assert vllm_lite.__all__ == [
        "Engine",
        "EngineConfig",
        "GenerationOutput",
        "GenerationStream",
        "Message",
        "SamplingParams",
        "StreamItem",
    ]


def test_the_template_is_the_tokenizers_own_in_both_orders_of_arguments(engine, caplog):
    messages = [Message("system", "Be brief."), {"role": "user", "content": "Hi"}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = engine._local.tokenizer.apply_chat_template(plain)
    assert engine.apply_chat_template(messages) == expected
    with caplog.at_level("INFO", "vllm_lite"):
        assert engine.apply_chat_template(SamplingParams(), messages, True) == expected
        assert engine.apply_chat_template(messages, log_prompt=True) == expected
    assert caplog.messages == [expected, expected]
    with pytest.raises(TypeError, match="needs messages"):
        engine.apply_chat_template(SamplingParams())


def test_answers_come_in_order_with_their_figures(engine):
    prompts = [ask(engine, text) for text in ("What is vllm-lite?", "Hello", "Count to 3")]
    params = SamplingParams(**GREEDY, max_tokens=12, ignore_eos=True)
    outputs = engine.generate_sync(params, prompts)
    alone = [engine.generate_sync([params], [prompt])[0] for prompt in prompts]
    assert [o.decode_output for o in outputs] == [o.decode_output for o in alone]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.prompt_length == len(engine._local.encode(prompt))
        assert output.decoded_length == 12
        assert output.prompt_start_time <= output.decode_start_time <= output.decode_finish_time
        assert output.prompt_start_time > 1.5e12, "milliseconds since 1970"
    assert outputs[0].seq_id < outputs[1].seq_id < outputs[2].seq_id


class Scripted:
    """A stream whose news a test lays down, and that notes when it is read."""

    def __init__(self, name, log, *news):
        self.name, self.log, self.news = name, log, list(news)

    @property
    def is_over(self):
        return not self.news

    def wait(self):
        self.log.append(f"wait {self.name}")
        return self.news.pop(0)

    def poll(self):
        self.log.append(f"poll {self.name}")
        return self.news.pop(0)


def test_answers_are_read_side_by_side_so_that_their_times_are_their_own():
    log = []
    a = Scripted("a", log, [Piece(1, "x")], [Piece(2, "y")])
    b = Scripted("b", log, [], [Piece(3, "z")], [Piece(None, "!")])
    assert read_all([a, b]) == ["xy", "z!"]
    assert log == ["wait a", "poll b", "wait a", "poll b", "wait b"]
    assert read_all([]) == []


def test_params_that_differ_go_with_their_prompts(engine):
    short, long = (
        SamplingParams(**GREEDY, max_tokens=n, min_tokens=n, ignore_eos=True) for n in (2, 5)
    )
    outputs = engine.generate_sync([short, long], [ask(engine, "Hello")] * 2)
    assert [o.decoded_length for o in outputs] == [2, 5]
    assert [o.finish_reason for o in outputs] == ["length", "length"]
    with pytest.raises(InvalidRequestError, match="2 params for 3 prompts"):
        engine.generate_sync([short, long], ["a", "b", "c"])


@pytest.mark.parametrize(
    ("params", "prompt", "error"),
    [
        (SamplingParams(), "word " * 400, ContextLengthError),
        (SamplingParams(), "", InvalidRequestError),
        (SamplingParams(temperature=3.0), "a", InvalidRequestError),
        (SamplingParams(max_tokens=0), "a", InvalidRequestError),
        (SamplingParams(n=2), "a", InvalidRequestError),
        (SamplingParams(response_format={"type": "json_object"}), "a", InvalidRequestError),
        (SamplingParams(stop=[""]), "a", InvalidRequestError),
        (SamplingParams(allowed_token_ids=[]), "a", InvalidRequestError),
    ],
)
def test_one_bad_prompt_raises_before_anything_runs(engine, params, prompt, error):
    before = engine._local._engine.snapshot().received
    with pytest.raises(error):
        engine.generate_sync([SamplingParams(max_tokens=1), params], ["good", prompt])
    assert engine._local._engine.snapshot().received == before


def test_a_stream_tells_tokens_ids_the_whole_text_and_the_times(engine):
    params = SamplingParams(**GREEDY, max_tokens=16)
    prompt = ask(engine, "What is vllm-lite?")
    seq_id, prompt_length, stream = engine.generate_stream(params, prompt)
    items = list(stream)
    (expected,) = engine.generate_sync(params, [prompt])
    assert expected.seq_id == seq_id + 1
    assert prompt_length == expected.prompt_length
    assert "".join(map(str, items)) == expected.decode_output
    kinds = [item.datatype for item in items]
    assert kinds[-2:] == ["COMPLETION", "DONE"]
    assert items[-2].data == expected.decode_output
    assert kinds.count("TOKEN_ID") == expected.decoded_length
    done = items[-1].data
    assert isinstance(done, Done) and done.length == expected.decoded_length
    assert done.prompt_start <= done.decode_start <= done.decode_finish
    assert "".join(engine.stream(params, prompt)) == expected.decode_output


def drain(engine):
    """Until nothing runs; an answer takes no reader to end."""
    import asyncio

    assert asyncio.run(engine._local._engine.drain(60))


@pytest.mark.parametrize("how", ["leave the loop", "cancel", "plain text"])
def test_leaving_or_cancelling_a_stream_frees_its_blocks(engine, how):
    params = SamplingParams(**GREEDY, max_tokens=200, ignore_eos=True)
    if how == "plain text":
        for _ in engine.stream(params, ask(engine, "Hello")):
            break
    else:
        _, _, stream = engine.generate_stream(params, ask(engine, "Hello"))
        for i, _ in enumerate(stream):
            if how == "cancel":
                stream.cancel()
            elif i == 2:
                break
    drain(engine)
    stats = engine._local._engine.snapshot()
    assert stats.num_running == 0 and stats.kv_usage == 0


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(engine):
    prompt = ask(engine, "What is vllm-lite?")
    params = SamplingParams(**GREEDY, max_tokens=24)
    (whole,) = engine.generate_sync(params, prompt)
    stop = whole.decode_output[4:8]
    cut = whole.decode_output[: whole.decode_output.index(stop)]
    (output,) = engine.generate_sync(SamplingParams(**GREEDY, max_tokens=24, stop=stop), prompt)
    assert output.decode_output == cut and output.finish_reason == "stop"
    assert output.decoded_length < whole.decoded_length
    kept = SamplingParams(**GREEDY, max_tokens=24, stop=[stop], include_stop_str_in_output=True)
    assert engine.generate_sync(kept, prompt)[0].decode_output == cut + stop
    drain(engine)


def test_a_stop_token_ends_the_answer(engine):
    prompt = ask(engine, "What is vllm-lite?")
    _, _, stream = engine.generate_stream(SamplingParams(**GREEDY, max_tokens=8), prompt)
    ids = [item.data for item in stream if item.datatype == "TOKEN_ID"]
    params = SamplingParams(**GREEDY, max_tokens=8, stop_token_ids=[ids[3]])
    (output,) = engine.generate_sync(params, prompt)
    assert output.decoded_length == ids.index(ids[3]) + 1 and output.finish_reason == "stop"


def test_logprobs_come_one_per_token(engine):
    params = SamplingParams(**GREEDY, max_tokens=4, logprobs=2, prompt_logprobs=0)
    (output,) = engine.generate_sync(params, ask(engine, "Hello"))
    assert len(output.logprobs) == output.decoded_length
    assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in output.logprobs)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == output.prompt_length


def test_a_seed_repeats_an_answer_and_allowed_tokens_bind(engine):
    prompt = ask(engine, "Tell a story.")
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=16, ignore_eos=True)
    first, second = engine.generate_sync(params, [prompt, prompt])
    assert first.decode_output == second.decode_output
    only = SamplingParams(temperature=1.0, max_tokens=3, allowed_token_ids=[300], ignore_eos=True)
    _, _, stream = engine.generate_stream(only, prompt)
    assert [i.data for i in stream if i.datatype == "TOKEN_ID"] == [300] * 3


def test_the_second_turn_of_a_session_finds_the_first_one_cached(engine):
    params = SamplingParams(**GREEDY, max_tokens=40, ignore_eos=True)
    params.session_id = "conversation-1"
    messages = [Message("user", "What is vllm-lite, and what is a paged KV cache?")]
    (first,) = engine.generate_sync(params, engine.apply_chat_template(messages))
    messages += [Message("assistant", first.decode_output), Message("user", "Thanks!")]
    (second,) = engine.generate_sync(params, engine.apply_chat_template(messages))
    assert second.num_cached_tokens >= first.prompt_length // 16 * 16 > 0
    assert engine.kv_usage > 0, "the session keeps its blocks"


def test_a_session_without_the_context_cache_works_and_is_told_once(caplog):
    params = SamplingParams(max_tokens=1, session_id="s")
    with Engine(EngineConfig(**SMALL)) as engine, caplog.at_level("INFO", "vllm_server"):
        engine.generate_sync(params, ["a", "b"])
        assert engine.kv_usage == 0
    assert sum("not pinned" in message for message in caplog.messages) == 1


def test_an_engine_is_closed_by_its_context_and_only_once():
    with Engine(EngineConfig(**SMALL)) as engine:
        local = engine._local
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.generate_sync(SamplingParams(), "a")
    assert local.model.backend._runner is None, "weights and KV pool are dropped"


def test_the_dtype_argument_wins_over_the_field():
    with Engine(EngineConfig(**SMALL), "bf16") as engine:
        assert engine._local.model.memory.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_model_length": 9}, TypeError, r"did you mean max_model_len\?"),
        ({"draft_model": "tiny"}, TypeError, "not available in this version"),
        ({"weight_file": "x.gguf"}, ModelError, "has no file 'x.gguf'"),
        ({"weight_file": "x.gguf", "gguf_file": "y.gguf"}, ConfigError, "give one of them"),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0, but must be at least 1"),
        ({"dtype": "int3"}, ConfigError, "must be one of"),
        ({"weight_path": "a", "model_path": "b"}, ConfigError, "give one of them"),
        ({"model": "no-such-folder"}, ModelError, "neither an existing folder"),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Engine(EngineConfig(**fields))


def test_names_of_other_versions_of_this_api_work():
    assert EngineConfig(model_id="a/b").settings("auto").engine.model == "a/b"
    assert EngineConfig(model_path="x").settings("auto").engine.weight_path == "x"
    assert EngineConfig(weight_file="x.gguf").settings("auto").engine.gguf_file == "x.gguf"
    settings = EngineConfig(seed=5, max_model_len="4k").settings("f16")
    assert settings.sampling.seed == 5
    assert settings.engine.max_model_len == 4000 and settings.engine.dtype == "f16"


def test_an_unknown_param_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"no field 'temprature'; did you mean temperature\?"):
        SamplingParams(temprature=1)


@pytest.mark.parametrize("name", ["server", "chat", "completion"])
def test_module_aliases_are_the_commands(name):
    done = subprocess.run(
        [sys.executable, "-m", f"vllm_lite.{name}", "--help"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0
    assert f"usage: vllm-lite {name.replace('server', 'serve')}" in done.stdout
