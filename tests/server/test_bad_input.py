"""Every bad request gets a located 4xx, quickly, and the server stays well."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

HI = [{"role": "user", "content": "hi"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
EMBED, TOKENIZE, DETOKENIZE = "/v1/embeddings", "/tokenize", "/detokenize"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    PLAIN: {"prompt": "hi"},
    EMBED: {"input": "hi"},
    TOKENIZE: {"prompt": "hi"},
    DETOKENIZE: {"tokens": [70]},
}


class Case(NamedTuple):
    path: str
    body: bytes
    status: int
    code: str
    param: str | None


def case(
    path: str, code: str, param: str | None, *, status: int = 400, drop: str = "", **fields: Any
) -> Case:
    body = {k: v for k, v in BASE[path].items() if k != drop} | fields
    return Case(path, json.dumps(body).encode(), status, code, param)


NUMBERS: list[Any] = [-(2**63), 2**63, "1", True, [], {}]
FLOAT_FIELDS = {
    "temperature": [-0.1, 2.1],
    "top_p": [0, -1, 1.1],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
}
INT_FIELDS: dict[str, list[Any]] = {
    "top_k": [-2, 1.5, 2**31],
    "n": [0, -1, 129, 1.5, 2**53 + 1],
    "max_tokens": [-1, 0, 4097, 1.5, 2**31],
    "max_completion_tokens": [-1, 0, 4097],
    "min_tokens": [-1, 1.5, 5000],
    "seed": [1.5],
    "priority": [-(2**31) - 1, 2**31, 1.5],
    "prompt_logprobs": [-1, 21, 1.5],
    "truncate_prompt_tokens": [-2, 0, 4096, 1.5],
}
BOOL_FIELDS = [
    "stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens",
    "return_token_ids", "return_tokens_as_token_ids", "return_prompt_text",
]  # fmt: skip


def shared_cases() -> Iterator[Case]:
    for field, values in FLOAT_FIELDS.items():
        for value in [*values, *NUMBERS]:
            if not (field == "repetition_penalty" and value == 2**63):
                yield case(CHAT, "invalid_value", field, **{field: value})
    yield case(CHAT, "invalid_value", "repetition_penalty", repetition_penalty=2**63)
    for field, values in INT_FIELDS.items():
        for value in [*values, *(v for v in NUMBERS if not (field == "seed" and v == -(2**63)))]:
            yield case(PLAIN, "invalid_value", field, **{field: value})
    for path in (CHAT, PLAIN):
        for field in BOOL_FIELDS:
            for value in (1, "true", []):
                yield case(path, "invalid_value", field, **{field: value})


def list_cases() -> Iterator[Case]:
    ids: list[Any] = [[-1], [1024], [2**31], ["1"], [True], [1.5], [None], "1", 1, {}]
    for value in ids:
        yield case(CHAT, "invalid_value", "stop_token_ids", stop_token_ids=value)
        yield case(PLAIN, "invalid_value", "allowed_token_ids", allowed_token_ids=value)
    yield case(PLAIN, "invalid_value", "allowed_token_ids", allowed_token_ids=[])
    for stop in ([""], "", 1, [1], {}, ["a"] * 17, ["a" * 2000], [None], True):
        yield case(CHAT, "invalid_value", "stop", stop=stop)
    biases: list[Any] = [
        [], "a", {"a": 1}, {"-1": 1}, {"1024": 1}, {"1": "1"}, {"1": True}, {"1.5": 1},
        {"": 1}, {"²": 1}, {str(i): 1 for i in range(1025)}, {"9" * 11: 1},
    ]  # fmt: skip
    for bias in biases:
        yield case(CHAT, "invalid_value", "logit_bias", logit_bias=bias)
    for words in ([], "a", [""], [" "], [1], ["a"] * 257):
        yield case(CHAT, "invalid_value", "bad_words", bad_words=words)


def text_cases() -> Iterator[Case]:
    for field, values in {
        "session_id": ["", "a" * 129, 1],
        "cache_salt": ["", "a" * 129, "a/b", "a@b", "a\\b", "a\x00b", 1],
        "request_id": ["", "a" * 129, "a b", "é", 1],
        "truncation_side": ["up", 1],
    }.items():
        for value in values:
            yield case(CHAT, "invalid_value", field, **{field: value})
    yield case(CHAT, "invalid_value", "model", model=1)
    for name in ("nope", "../../etc/passwd", "a" * 4000, "a\x00b", "ТINY"):
        yield case(CHAT, "model_not_found", "model", status=404, model=name)
        yield case(EMBED, "model_not_found", "model", status=404, model=name)
    yield case(CHAT, "invalid_value", "model", model="a" * 5000)


def message_cases() -> Iterator[Case]:
    yield case(CHAT, "missing_field", "messages", drop="messages")
    for value in ([], {}, "hi", 1, True):
        yield case(CHAT, "invalid_value", "messages", messages=value)
    yield case(CHAT, "invalid_value", "messages", messages=HI * 4097)
    yield case(CHAT, "invalid_value", "messages.0", messages=["hi"])
    yield case(CHAT, "missing_field", "messages.0.role", messages=[{"content": "hi"}])
    for role in ("robot", "", 1, None):
        yield case(
            CHAT, "invalid_value", "messages.0.role", messages=[{"role": role, "content": "hi"}]
        )
    for content in (1, True, {}, [1], [{}], [{"type": "text"}], [{"type": "text", "text": 1}]):
        yield case(
            CHAT,
            "invalid_value",
            "messages.1.content",
            messages=[*HI, {"role": "user", "content": content}],
        )
    for kind in ("image_url", "input_audio", "file", "video_url"):
        url = {"type": kind, kind: {"url": "http://169.254.169.254/"}}
        yield case(
            CHAT,
            "unsupported_content",
            "messages.0.content",
            messages=[{"role": "user", "content": [url]}],
        )
    for role in ("user", "system", "tool"):
        yield case(CHAT, "missing_field", "messages.0.content", messages=[{"role": role}])
    yield case(CHAT, "missing_field", "messages.0.content", messages=[{"role": "assistant"}])
    calls = [{"role": "assistant", "tool_calls": [{"id": "a"}]}]
    yield case(CHAT, "invalid_value", "messages.0.tool_calls", messages=calls)
    yield case(CHAT, "invalid_value", "messages.0.name", messages=[{**HI[0], "name": 1}])


def template_cases() -> Iterator[Case]:
    for name in ("tokenize", "messages", "add_generation_prompt", "tools", "_x", "__class__"):
        param = f"chat_template_kwargs.{name}"
        yield case(CHAT, "invalid_value", param, chat_template_kwargs={name: True})
    for value in ({}, [], [{"a": 1}]):
        yield case(
            CHAT, "invalid_value", "chat_template_kwargs.x", chat_template_kwargs={"x": value}
        )
    for value in (1, "a", []):
        yield case(CHAT, "invalid_value", "chat_template_kwargs", chat_template_kwargs=value)
    yield case(CHAT, "unsupported_parameter", "chat_template", chat_template="{{ 1 }}")
    yield case(CHAT, "invalid_value", "reasoning_effort", reasoning_effort="huge")
    yield case(CHAT, "invalid_value", "thinking", thinking=1)
    yield case(CHAT, "invalid_value", "enable_thinking", thinking=True, enable_thinking=False)
    yield case(
        CHAT,
        "invalid_value",
        "continue_final_message",
        add_generation_prompt=True,
        continue_final_message=True,
    )
    yield case(CHAT, "invalid_value", "continue_final_message", continue_final_message=True)


def contradiction_cases() -> Iterator[Case]:
    yield case(CHAT, "invalid_value", "top_logprobs", top_logprobs=2)
    yield case(CHAT, "invalid_value", "top_logprobs", top_logprobs=21, logprobs=True)
    yield case(CHAT, "invalid_value", "top_logprobs", top_logprobs=-1, logprobs=True)
    yield case(CHAT, "invalid_value", "logprobs", logprobs=1)
    for value in (-1, 21, True, "1", 1.5):
        yield case(PLAIN, "invalid_value", "logprobs", logprobs=value)
    options = "stream_options"
    yield case(CHAT, "invalid_value", options, stream_options={"include_usage": True})
    yield case(CHAT, "invalid_value", options, stream=True, stream_options=[])
    yield case(
        CHAT,
        "invalid_value",
        f"{options}.include_usage",
        stream=True,
        stream_options={"include_usage": 1},
    )
    yield case(
        CHAT,
        "invalid_value",
        f"{options}.continuous_usage_stats",
        stream=True,
        stream_options={"continuous_usage_stats": True},
    )
    yield case(CHAT, "invalid_value", "prompt_logprobs", stream=True, prompt_logprobs=1)
    yield case(PLAIN, "invalid_value", "max_tokens", max_tokens=0, echo=False)
    yield case(PLAIN, "invalid_value", "min_tokens", max_tokens=4, min_tokens=5)
    yield case(PLAIN, "invalid_value", "n", prompt=["a"] * 20, n=100)
    yield case(PLAIN, "invalid_value", "echo", echo="yes")


def unsupported_cases() -> Iterator[Case]:
    values: dict[str, Any] = {
        "best_of": 2, "use_beam_search": True, "length_penalty": 1.5, "tools": [],
        "tool_choice": "auto", "functions": [], "function_call": "auto",
        "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"},
        "guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a",
        "regex": "a", "ebnf": "a", "grammar": "a", "json_schema": {}, "structural_tag": {},
        "prompt_embeds": "AAAA", "kv_transfer_params": {}, "vllm_xargs": {},
        "mm_processor_kwargs": {}, "mm_anything": 1, "media_io_kwargs": {},
        "modalities": ["audio"], "web_search_options": {}, "audio": {}, "moderation": {},
        "store": True, "stream_interval": 2, "thinking_token_budget": 5, "suffix": "a",
        "logits_processors": [], "return_timings": True,
    }  # fmt: skip
    for name, value in values.items():
        yield case(CHAT, "unsupported_parameter", name, **{name: value})
        yield case(PLAIN, "unsupported_parameter", name, **{name: value})
    yield case(PLAIN, "unsupported_parameter", "messages", messages=HI)
    yield case(EMBED, "unsupported_parameter", "messages", messages=HI)
    yield case(CHAT, "unsupported_parameter", "echo", echo=True)


def prompt_cases() -> Iterator[Case]:
    bad: list[Any] = [
        "", [], {}, 1, True, [""], ["a", ""], [[]], [[1], []], ["a", [1]], [[1], "a"], [1, "a"],
        [1, True], [1.5], [-1], [1024], [2**31], [[1024]], [["a"]], [None], [{}],
        ["a"] * 1025,
    ]  # fmt: skip
    for value in bad:
        yield case(PLAIN, "invalid_value", "prompt", prompt=value)
    yield case(PLAIN, "missing_field", "prompt", drop="prompt")
    yield case(PLAIN, "context_length_exceeded", "prompt", prompt="a" * 4096)
    yield case(PLAIN, "context_length_exceeded", "prompt", prompt="a" * 4096 * 9)
    yield case(PLAIN, "context_length_exceeded", "prompt", prompt=[70] * 4096)
    long = [{"role": "user", "content": "a" * 40_000}]
    yield case(CHAT, "context_length_exceeded", "messages", messages=long)
    long = [{"role": "user", "content": "a" * 4096}]
    yield case(CHAT, "context_length_exceeded", "messages", messages=long)


def other_route_cases() -> Iterator[Case]:
    bad: list[Any] = ["", [], {}, 1, [""], [[]], [[1024]], [-1], [1, "a"], ["a"] * 2049]
    for value in bad:
        yield case(EMBED, "invalid_value", "input", input=value)
    yield case(EMBED, "missing_field", "input", drop="input")
    yield case(EMBED, "context_length_exceeded", "input", input=[70] * 4097)
    yield case(EMBED, "invalid_value", "encoding_format", encoding_format="hex")
    for value in (0, -1, 4, 9, 2**31, "8", 1.5):
        yield case(EMBED, "invalid_value", "dimensions", dimensions=value)
    yield case(EMBED, "invalid_value", "normalize", normalize=1)
    yield case(EMBED, "invalid_value", "truncate_prompt_tokens", truncate_prompt_tokens=5000)
    yield case(TOKENIZE, "invalid_value", "prompt", drop="prompt")
    yield case(TOKENIZE, "invalid_value", "prompt", messages=HI)
    yield case(TOKENIZE, "invalid_value", "prompt", prompt=1)
    yield case(TOKENIZE, "invalid_value", "messages", drop="prompt", messages=[])
    yield case(TOKENIZE, "context_length_exceeded", "prompt", prompt="a" * 40_000)
    yield case(TOKENIZE, "unsupported_parameter", "chat_template", chat_template="a")
    yield case(DETOKENIZE, "missing_field", "tokens", drop="tokens")
    for value in ("a", [1024], [-1], ["a"], [True], {}):
        yield case(DETOKENIZE, "invalid_value", "tokens", tokens=value)


def json_cases() -> Iterator[Case]:
    head = b'{"messages":[{"role":"user","content":"hi"}],'
    bad = [
        b"", b"{", b"[]", b'"a"', b"1", b"null", b"true", b"NaN", b"{'a':1}", b'{"a":1,}',
        b"\xff\xfe{}", b"\xef\xbb\xbf{}", b'{"a":"\x01"}', b"[" * 100_000,
        b'{"a":' * 70 + b"1" + b"}" * 70, b'{"a":' + b"1" * 5000 + b"}",
        head + b'"temperature":NaN}', head + b'"temperature":Infinity}',
        head + b'"temperature":-Infinity}', head + b'"temperature":1e999}',
        head + b'"n":1,"n":2}', head + b'"user":"\\ud800"}', head + b'"user":"\\udc00x"}',
        head + b'"user":"\xc3"}', head + b'"a":"\\u12"}', head,
        b'{"messages":[{"role":"user","role":"user","content":"hi"}]}',
    ]  # fmt: skip
    for body in bad:
        yield Case(CHAT, body, 400, "invalid_json", None)
    for path in (PLAIN, EMBED, TOKENIZE, DETOKENIZE):
        for body in (b"", b"{", b"[]", b'{"a":1,"a":2}'):
            yield Case(path, body, 400, "invalid_json", None)


CASES = [
    *shared_cases(), *list_cases(), *text_cases(), *message_cases(), *template_cases(),
    *contradiction_cases(), *unsupported_cases(), *prompt_cases(), *other_route_cases(),
    *json_cases(),
]  # fmt: skip


def test_every_bad_request_gets_a_located_answer_and_the_server_stays_well(serve):
    server = serve("Hello!")
    server.chat()
    wrong: list[str] = []
    started = time.perf_counter()
    for each in CASES:
        response = server.client.post(
            each.path, content=each.body, headers={"content-type": "application/json"}
        )
        error = response.json().get("error", {})
        found = (response.status_code, error.get("code"), error.get("param"))
        kind = "not_found_error" if each.status == 404 else "invalid_request_error"
        if found != each[2:] or error["type"] != kind or not error["message"]:
            wrong.append(f"{each.path} {each.body[:200]!r}: {found}, not {each[2:]}")
        assert len(response.content) < 8000
    seconds = time.perf_counter() - started
    assert not wrong, f"{len(wrong)} of {len(CASES)}:\n" + "\n".join(wrong)
    assert len(CASES) >= 200
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.chat().status_code == 200
    assert seconds < 10, f"{len(CASES)} cases took {seconds:.1f} s"


@pytest.mark.parametrize(
    ("headers", "param"),
    [({"content-encoding": "gzip"}, None), ({"content-type": "text/plain"}, None)],
)
def test_a_body_that_is_not_plain_json_is_refused(serve, headers, param):
    response = serve().client.post(CHAT, content=b"{}", headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_without_content_type_is_json(serve):
    response = serve().client.post(CHAT, content=json.dumps({"messages": HI}).encode())
    assert response.status_code == 200


def test_a_context_error_carries_both_numbers_in_the_words_clients_match(serve):
    error = serve().complete("a" * 5000).json()["error"]
    assert error["message"].startswith("This model's maximum context length is 4096 tokens")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (5000, 4096)


def test_an_unknown_parameter_is_named_in_a_header(serve):
    response = serve().chat(frobnicate=1)
    assert response.status_code == 200
    assert "frobnicate" in response.headers["x-vllm-lite-warning"]


def test_parameters_without_effect_pass_silently(serve):
    response = serve().chat(user="u", metadata={"a": "b"}, store=False, service_tier="auto")
    assert response.status_code == 200
    assert "x-vllm-lite-warning" not in response.headers


def test_neutral_values_of_refused_parameters_pass(serve):
    response = serve().chat(
        best_of=1, tool_choice="none", response_format={"type": "text"}, modalities=["text"]
    )
    assert response.status_code == 200
    assert "x-vllm-lite-warning" not in response.headers


@pytest.mark.parametrize(
    "fields",
    [
        {"truncation_side": "x" * 10_000},
        {"model": "x" * 4_000},
        {"mm_" + "x" * 10_000: 1},
        {"chat_template_kwargs": {"_" + "x" * 10_000: 1}},
        {"logit_bias": {"x" * 10_000: 1}},
    ],
)
def test_a_long_text_of_the_client_is_cut_in_the_answer(serve, fields):
    assert len(serve().chat(**fields).content) < 1000


def test_long_unknown_names_are_cut_in_header_and_answer(serve):
    from vllm_server.config.schema import ServerSettings, Settings

    name = "x\r\nevil: 1" + "y" * 10_000
    response = serve().chat(**{name: 1})
    assert response.status_code == 200
    assert len(response.headers["x-vllm-lite-warning"]) < 200
    assert "evil" not in response.headers
    strict = serve(settings=Settings(server=ServerSettings(strict_params=True))).chat(**{name: 1})
    assert len(strict.content) < 1000
