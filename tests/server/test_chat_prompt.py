"""What becomes the prompt of a chat request: messages, template, cuts."""

from __future__ import annotations


def prompt_text(server, messages, **more):
    body = {"messages": messages, "return_prompt_text": True, "max_tokens": 1, **more}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["prompt_text"]


def test_text_parts_are_joined_and_developer_is_system_where_the_template_lacks_it(serve):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": parts}]
    text = prompt_text(serve(), messages, add_generation_prompt=False)
    assert text == "<|im_start|>system\na\nb<|im_end|>\n"


def test_the_last_message_can_be_continued(serve):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So I"}]
    text = prompt_text(serve(), messages, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nSo I")


def test_thinking_switches_the_template(serve):
    messages = [{"role": "user", "content": "a"}]
    assert prompt_text(serve(), messages, enable_thinking=True).endswith("<think>\n")
    assert not prompt_text(serve(), messages, thinking=False).endswith("<think>\n")
    off = prompt_text(serve(), messages, thinking=True, reasoning_effort="none")
    assert not off.endswith("<think>\n")


def test_template_variables_nobody_knows_are_left_out_with_a_warning(serve):
    response = serve().chat(chat_template_kwargs={"colour": "red"})
    assert "chat_template_kwargs.colour" in response.headers["x-vllm-lite-warning"]


def test_a_prompt_can_be_cut_from_either_side(serve):
    server = serve()
    left = server.chat("abc", truncate_prompt_tokens=4, return_token_ids=True).json()
    right = server.chat(
        "abc", truncate_prompt_tokens=4, truncation_side="right", return_token_ids=True
    ).json()
    assert len(left["prompt_token_ids"]) == len(right["prompt_token_ids"]) == 4
    assert right["prompt_token_ids"][0] == 1
    assert left["prompt_token_ids"][0] != 1
    assert server.chat("abc", truncate_prompt_tokens=-1).status_code == 200
