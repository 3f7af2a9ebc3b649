"""Reasoning in chat answers: split off, left in or hidden, plain and streamed."""

from __future__ import annotations

import pytest


def joined(events, field="content", index=0):
    return "".join(
        c["delta"].get(field, "") for e in events for c in e["choices"] if c["index"] == index
    )


THOUGHT = "<think>\nhm, so\n</think>\n\nYes."


def test_reasoning_is_split_from_the_answer(serve):
    body = serve(THOUGHT).chat().json()
    message = body["choices"][0]["message"]
    assert message["content"] == "Yes."
    assert message["reasoning"] == message["reasoning_content"] == "hm, so"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 9


def test_streamed_reasoning_equals_the_plain_one(serve):
    events = serve(THOUGHT).stream_chat()
    assert joined(events, "reasoning") == joined(events, "reasoning_content") == "hm, so"
    assert joined(events) == "Yes."


def test_reasoning_that_the_template_opened_is_split_too(serve):
    body = serve("hm</think>Yes.").chat(chat_template_kwargs={"enable_thinking": True}).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "Yes.")


@pytest.mark.parametrize("stream", [True, False])
def test_reasoning_can_be_left_in_or_hidden(serve, stream):
    def content(**more):
        if stream:
            events = serve(THOUGHT).stream_chat(**more)
            return joined(events), joined(events, "reasoning")
        message = serve(THOUGHT).chat(**more).json()["choices"][0]["message"]
        return message["content"], message.get("reasoning", "")

    assert content(separate_reasoning=False) == (THOUGHT, "")
    assert content(include_reasoning=False) == ("Yes.", "")


def test_hidden_reasoning_hides_its_logprobs(serve):
    body = serve("<think>hm</think>Yes.").chat(include_reasoning=False, logprobs=True).json()
    tokens = [e["token"] for e in body["choices"][0]["logprobs"]["content"]]
    assert "".join(tokens) == "Yes.<|end|>"


def test_history_may_carry_reasoning_under_either_name(serve, tokenizer_folder, tmp_path):
    from vllm_server.text.tokenizer import Tokenizer

    text = Tokenizer(
        tokenizer_folder,
        "{% for m in messages %}[{{ m.reasoning }}|{{ m.reasoning_content }}]{% endfor %}",
    )
    for name in ("reasoning", "reasoning_content"):
        history = [{"role": "assistant", "content": "a", name: "why"}]
        body = serve(text=text).client.post(
            "/v1/chat/completions", json={"messages": history, "return_prompt_text": True}
        )
        assert body.json()["prompt_text"] == "[why|why]"
