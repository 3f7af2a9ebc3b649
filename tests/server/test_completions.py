"""`/v1/completions`: prompts in every shape, echo, scoring, log-probabilities."""

from __future__ import annotations

import pytest


def joined(events, index=0):
    return "".join(c["text"] for e in events for c in e["choices"] if c["index"] == index)


def test_a_text_is_continued_and_the_model_may_be_left_out(serve):
    body = serve(" world").complete("Hello").json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"][0] == {
        "index": 0,
        "text": " world",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert body["usage"]["prompt_tokens"] == 5


def test_a_completion_has_16_tokens_unless_more_are_asked_for(serve):
    server = serve("x" * 100)
    assert server.complete().json()["usage"]["completion_tokens"] == 16
    assert server.complete(max_tokens=40).json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("as_ids", [True, False])
def test_several_prompts_give_choices_in_order(serve, tokenizer, as_ids):
    server = serve(lambda prompt: prompt)
    prompts = ["ab", "cde", "f"]
    given = [tokenizer.encode(p, False) for p in prompts] if as_ids else prompts
    body = server.complete(given, n=2, seed=1).json()
    assert [c["text"] for c in body["choices"]] == ["ab", "ab", "cde", "cde", "f", "f"]
    assert [c["index"] for c in body["choices"]] == list(range(6))
    assert body["usage"]["prompt_tokens"] == 6
    events = server.events("/v1/completions", {"prompt": given, "n": 2})
    assert [joined(events, i) for i in range(6)] == ["ab", "ab", "cde", "cde", "f", "f"]


def test_a_single_list_of_ids_is_one_prompt(serve, tokenizer):
    body = serve(lambda prompt: prompt).complete(tokenizer.encode("abc", False)).json()
    assert [c["text"] for c in body["choices"]] == ["abc"]


def test_a_stream_says_the_same_and_its_finish_may_carry_text(serve):
    server = serve(" wörld")
    events = server.events("/v1/completions", {"prompt": "a", "stream_options": {
        "include_usage": True}})  # fmt: skip
    assert joined(events) == " wörld"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"] == server.complete("a").json()["usage"]


@pytest.mark.parametrize("stream", [True, False])
def test_echo_puts_the_prompt_first(serve, stream):
    server = serve("cd")
    if stream:
        events = server.events("/v1/completions", {"prompt": "ab", "echo": True})
        assert joined(events) == "abcd"
    else:
        assert server.complete("ab", echo=True).json()["choices"][0]["text"] == "abcd"


def test_echo_of_ids_is_their_text(serve, tokenizer):
    ids = tokenizer.encode("é!", False)
    assert serve("x").complete(ids, echo=True).json()["choices"][0]["text"] == "é!x"


def test_scoring_a_prompt_generates_nothing(serve):
    body = serve("x").complete("abc", echo=True, max_tokens=0, logprobs=2).json()
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 0


def test_logprobs_are_parallel_lists(serve):
    logprobs = serve("hi").complete("ab", logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "<|end|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])


def test_zero_logprobs_report_the_sampled_token(serve):
    logprobs = serve("h").complete("ab", logprobs=0).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"h": -0.5}


def test_streamed_logprobs_with_echo_equal_the_plain_ones(serve):
    server = serve("hello")
    asked = {"prompt": "ab", "logprobs": 1, "echo": True, "return_token_ids": True}
    plain = server.complete(**asked).json()["choices"][0]
    events = server.events("/v1/completions", asked)
    for name, values in plain["logprobs"].items():
        streamed = [v for e in events for v in (e["choices"][0]["logprobs"] or {}).get(name, [])]
        assert streamed == values
    ids = [i for e in events for i in e["choices"][0].get("token_ids", [])]
    assert ids == plain["token_ids"]
    assert events[0]["choices"][0]["prompt_token_ids"] == plain["prompt_token_ids"]


def test_prompt_logprobs_stand_beside_the_text(serve):
    choice = serve("x").complete("ab", prompt_logprobs=1).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    [entry] = [e for e in choice["prompt_logprobs"][1].values() if e["rank"] == 1]
    assert (entry["logprob"], entry["decoded_token"]) == (-0.5, "b")


def test_logit_bias_keys_may_be_written_with_zeros(serve):
    assert serve().complete(logit_bias={"07": 1, "7": 2}).status_code == 200


def test_a_body_over_256_kb_is_read_off_the_loop_with_the_same_answer(serve):
    body = serve("x").complete("ab", metadata={"a": "b" * 300_000}).json()
    assert body["choices"][0]["text"] == "x"


def test_a_long_text_is_encoded_off_the_loop_with_the_same_answer(serve):
    assert serve(lambda p: p[:2]).complete("ab" * 600).json()["choices"][0]["text"] == "ab"
