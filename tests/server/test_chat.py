"""`/v1/chat/completions`: plain and streamed answers carry the same."""

from __future__ import annotations

import json

import pytest
from vllm_core import SchedulerConfig
from vllm_server.config.schema import EngineSettings, SamplingSettings, Settings
from vllm_traits import FinishReason, SamplingParams

USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 7,
    "total_tokens": 28,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def params_of(server, at=-1) -> SamplingParams:
    """Sampling of the newest sequence that reached the backend."""
    starts = [start for batch in server.backend.batches for start in batch.starts]
    return starts[at].params


def joined(events, field="content", index=0):
    return "".join(
        c["delta"].get(field, "") for e in events for c in e["choices"] if c["index"] == index
    )


def test_a_conversation_is_answered_in_full(serve):
    response = serve("Hello!").chat("hi")
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"] == "vllm-lite-0.1.0-00000000"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == USAGE


def test_a_stream_has_a_role_text_and_one_finish(serve):
    server = serve("Hello!")
    events = server.stream_chat("hi", stream_options={"include_usage": True})
    first, *middle, finish, usage = events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in e["choices"][0]["delta"] for e in middle)
    assert all(e["choices"][0]["finish_reason"] is None for e in (first, *middle))
    assert finish["choices"][0]["delta"] == {}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert joined(events) == "Hello!"
    assert (usage["choices"], usage["usage"]) == ([], USAGE)
    assert all(e["usage"] is None for e in events[:-1])
    for name in ("id", "created", "model", "system_fingerprint", "object"):
        assert len({e[name] for e in events}) == 1
    assert first["object"] == "chat.completion.chunk"


def test_a_stream_without_usage_has_no_such_member(serve):
    assert all("usage" not in e for e in serve().stream_chat())


def test_continuous_usage_counts_up_to_the_final_one(serve):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = serve("Hello!").stream_chat("hi", stream_options=options)
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[-1] == 7


def test_stream_headers_keep_proxies_from_buffering(serve):
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    headers = serve().client.post("/v1/chat/completions", json=body).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("text", ["漢字かな交じり文", "🙂👩‍👩‍👧", "naïve café"])
def test_streams_never_split_a_character(serve, text):
    events = serve(text).stream_chat()
    assert joined(events) == text
    assert all("\ufffd" not in json.dumps(e, ensure_ascii=False) for e in events)


@pytest.mark.parametrize("stop", ["lo", ["xx", "lo"], "o!"])
def test_a_stop_string_ends_the_answer_and_never_leaks(serve, stop):
    server = serve("Hello! and more")
    choice = server.chat(stop=stop).json()["choices"][0]
    want = "Hell" if stop == "o!" else "Hel"
    assert choice["message"]["content"] == want
    assert (choice["finish_reason"], choice["stop_reason"]) == (
        "stop",
        stop if isinstance(stop, str) else "lo",
    )
    events = server.stream_chat(stop=stop)
    assert joined(events) == want
    assert events[-1]["choices"][0]["stop_reason"] == choice["stop_reason"]


def test_a_stop_string_can_be_kept(serve):
    choice = serve("Hello!").chat(stop="ll", include_stop_str_in_output=True).json()["choices"][0]
    assert choice["message"]["content"] == "Hell"


def test_a_stop_string_counts_the_tokens_that_made_it(serve):
    server = serve("Hello! and more")
    assert server.chat(stop="lo").json()["usage"]["completion_tokens"] == 5


def test_a_stop_token_is_told_and_not_shown(serve, tokenizer):
    [bang] = tokenizer.encode("!", False)
    choice = serve("Hello!").chat(stop_token_ids=[bang]).json()["choices"][0]
    assert choice["message"]["content"] == "Hello"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", bang)


def test_max_tokens_cuts_and_says_so(serve):
    server = serve("Hello!")
    for name in ("max_tokens", "max_completion_tokens"):
        choice = server.chat(**{name: 3}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "length")
    both = server.chat(max_tokens=1, max_completion_tokens=2).json()["choices"][0]
    assert both["message"]["content"] == "He"


def test_without_a_limit_an_answer_gets_4096_tokens_or_the_room_there_is(serve):
    server = serve()
    server.chat("hi")
    assert params_of(server).max_tokens == 4096 - 21


def test_the_operators_ceiling_clips(serve):
    server = serve(settings=Settings(engine=EngineSettings(max_tokens=5)))
    server.chat("hi", max_tokens=50)
    assert params_of(server).max_tokens == 5
    server.chat("hi")
    assert params_of(server).max_tokens == 5


def test_every_sampling_field_reaches_the_engine(serve):
    server = serve()
    response = server.chat(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=-0.3, repeat_penalty=1.1, seed=7, max_tokens=9, min_tokens=2,
        stop_token_ids=[5, 6], ignore_eos=True, logit_bias={"7": 200, "8": -1},
        allowed_token_ids=list(range(3, 261)), bad_words=["ab"], logprobs=True, top_logprobs=3,
        prompt_logprobs=2,
    )  # fmt: skip
    assert response.status_code == 200, response.text
    a, b, space = (server.state.service.tokenizer.encode(c, False)[0] for c in "ab ")
    assert params_of(server) == SamplingParams(
        temperature=0.5, top_k=40, top_p=0.9, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=-0.3, repetition_penalty=1.1, seed=7, max_tokens=9, min_tokens=2,
        stop_token_ids=frozenset({5, 6}), ignore_eos=True, logit_bias=((7, 100.0), (8, -1.0)),
        allowed_token_ids=tuple(range(3, 261)), bad_token_ids=((a, b), (space, a, b)),
        logprobs=3, prompt_logprobs=2,
    )  # fmt: skip


def test_server_defaults_apply_where_a_request_is_silent(serve):
    server = serve(defaults=SamplingSettings(temperature=0.3, top_k=5, seed=11))
    server.chat()
    assert (params_of(server).temperature, params_of(server).top_k) == (0.3, 5)
    assert params_of(server).seed == 11
    server.chat(temperature=0, top_k=-1)
    assert (params_of(server).temperature, params_of(server).top_k) == (0.0, 0)


def test_choices_share_the_prompt_and_differ_in_seed(serve):
    server = serve("Hello!", settings=Settings())
    body = server.chat("a long enough question for a block", n=3, seed=5).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in body["choices"]} == {"Hello!"}
    starts = [s for batch in server.backend.batches for s in batch.starts]
    seeds = [s.params.seed for s in starts]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert body["usage"]["completion_tokens"] == 21
    chunks = {c.seq_id: c.start for b in reversed(server.backend.batches) for c in b.chunks}
    assert chunks[starts[1].seq_id] > 0, "the second choice missed the prefix cache"


def test_choices_are_streamed_with_their_index(serve):
    events = serve("Hello!").stream_chat(n=3)
    assert {c["index"] for e in events for c in e["choices"]} == {0, 1, 2}
    assert all(joined(events, index=i) == "Hello!" for i in range(3))
    finishes = [c for e in events for c in e["choices"] if c["finish_reason"]]
    assert len(finishes) == 3


def test_several_choices_may_end_by_a_stop_string(serve):
    body = serve("Hello! and more").chat(n=4, stop="!").json()
    assert [c["message"]["content"] for c in body["choices"]] == ["Hello"] * 4


def test_logprobs_name_every_token(serve):
    content = (
        serve("Hé").chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    )
    assert [entry["bytes"] for entry in content[:3]] == [[72], [0xC3], [0xA9]]
    assert content[0]["token"] == "H"
    assert content[0]["logprob"] == -0.5
    assert len(content[0]["top_logprobs"]) == 2


def test_streamed_logprobs_equal_the_plain_ones(serve):
    server = serve("Hé! <b>")
    asked = {"logprobs": True, "top_logprobs": 1, "stop": ["zz"]}
    plain = server.chat(**asked).json()["choices"][0]["logprobs"]["content"]
    events = server.stream_chat(**asked)
    streamed = [
        entry
        for e in events
        if e["choices"][0]["logprobs"]
        for entry in e["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == plain
    assert len(plain) == server.chat(**asked).json()["usage"]["completion_tokens"]


def test_tokens_can_be_named_by_their_id(serve, tokenizer):
    body = serve("H").chat(logprobs=True, return_tokens_as_token_ids=True).json()
    [h] = tokenizer.encode("H", False)
    assert body["choices"][0]["logprobs"]["content"][0]["token"] == f"token_id:{h}"


def test_prompt_logprobs_have_no_entry_for_the_first_token(serve):
    body = serve().chat(prompt_logprobs=1).json()
    entries = body["prompt_logprobs"]
    assert len(entries) == body["usage"]["prompt_tokens"]
    assert entries[0] is None
    assert all(isinstance(entry, dict) for entry in entries[1:])


def test_token_ids_and_the_prompt_are_returned_on_request(serve, tokenizer):
    body = serve("Hi").chat(return_token_ids=True, return_prompt_text=True).json()
    assert body["prompt_text"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(body["prompt_token_ids"], False) == body["prompt_text"]
    assert body["choices"][0]["token_ids"] == [*tokenizer.encode("Hi", False), 0]
    events = serve("Hi").stream_chat(return_token_ids=True)
    ids = [i for e in events for c in e["choices"] for i in c.get("token_ids", [])]
    assert ids == body["choices"][0]["token_ids"]
    assert events[0]["prompt_token_ids"] == body["prompt_token_ids"]


def test_an_immediate_repeat_reports_cached_tokens(serve):
    server = serve()
    server.chat("x" * 60)
    usage = server.chat("x" * 60).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


def test_a_cache_salt_keeps_prefixes_apart(serve):
    server = serve()
    server.chat("x" * 60, cache_salt="a")
    details = server.chat("x" * 60, cache_salt="b").json()["usage"]["prompt_tokens_details"]
    assert details == {"cached_tokens": 0}


@pytest.mark.parametrize("header", [True, False])
def test_a_session_is_known_to_the_engine_under_an_opaque_name(serve, header):
    server = serve(settings=Settings(engine=EngineSettings(context_cache=True)))
    seen = []
    generate = server.engine.generate
    server.state.service.engine.generate = lambda r: (seen.append(r), generate(r))[1]
    more = {} if header else {"session_id": "mine"}
    response = server.client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hi"}], **more},
        headers={"x-session-id": "mine", "x-priority": "-3"} if header else {"x-priority": "-3"},
    )
    assert response.status_code == 200
    assert seen[0].session_id and "mine" not in seen[0].session_id
    assert seen[0].priority == -3


def test_any_served_name_is_echoed(serve):
    assert serve().chat(model="org/tiny").json()["model"] == "org/tiny"


def test_a_request_id_becomes_part_of_the_answers_id(serve):
    assert serve().chat(request_id="abc").json()["id"] == "chatcmpl-abc"


def test_a_full_queue_is_503_with_retry_after(serve):
    from vllm_traits import QueueFullError

    server = serve()

    def refuse(request):
        raise QueueFullError("full")

    server.state.service.engine.generate = refuse
    for stream in (True, False):
        response = server.chat(stream=stream)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "server_overloaded"
        assert response.headers["retry-after"] == "1"


def test_a_fault_of_one_request_is_500_without_details(serve):
    from vllm_traits import RequestOutput

    server = serve()

    class Broken:
        request_id = "x"

        def abort(self): ...

        def __aiter__(self):
            return self

        async def __anext__(self):
            return RequestOutput("x", (), FinishReason.ERROR, error="secret /path 0x7f")

    server.state.service.engine.generate = lambda request: Broken()
    response = server.chat()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert server.chat(stream=True).status_code == 500


def test_an_unexpected_exception_is_500_without_its_text(serve):
    server = serve()

    def explode(request):
        raise RuntimeError("secret /path 0x7f")

    server.state.service.engine.generate = explode
    response = server.chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text


def test_small_pools_answer_many_choices(serve):
    server = serve("Hello!", num_blocks=8, scheduler=SchedulerConfig(max_sequences=2))
    body = server.chat(n=8).json()
    assert [c["message"]["content"] for c in body["choices"]] == ["Hello!"] * 8
