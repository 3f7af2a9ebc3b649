"""Chat templates: what model authors write works, what would harm the server does not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from vllm_server.text.chat_template import MAX_SOURCE_BYTES, ChatTemplate
from vllm_traits import InvalidRequestError, ModelError

TEMPLATES = Path(__file__).parents[3] / "shared" / "data" / "templates"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
ENDS = {
    "Qwen-Qwen2.5-7B-Instruct": "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "Qwen-Qwen3-0.6B": "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "meta-llama-Llama-3.1-8B-Instruct": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistralai-Mistral-Nemo-Instruct-2407": "[INST]Be brief.\n\nBye[/INST]",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜User｜>Bye<｜Assistant｜><think>\n",
    "GLM-4.6": "<|user|>\nBye<|assistant|>",
    "google-gemma-4-31B-it": "<|turn>user\nBye<turn|>\n<|turn>model\n",
}


@pytest.mark.parametrize("name", ENDS)
def test_the_templates_of_model_authors_render(name):
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"real chat templates are not at {TEMPLATES}")
    template = ChatTemplate(path.read_text("utf-8"), "<s>", "</s>")
    prompt = template.render(TALK, True)
    assert ENDS[name] in prompt
    assert "Be brief." in prompt


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("messages", [TALK, TALK[1:2], TALK[1:]], ids=["system", "one", "turns"])
@pytest.mark.parametrize("prompt", [True, False], ids=["open", "closed"])
def test_prompts_equal_those_of_the_reference(name, messages, prompt):
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"real chat templates are not at {TEMPLATES}")
    from transformers.utils import chat_template_utils as reference  # takes seconds

    source = path.read_text("utf-8")
    [expected], _ = reference.render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert ChatTemplate(source, "<s>", "</s>").render(messages, prompt) == expected


def test_thinking_is_switched_by_a_template_variable():
    path = TEMPLATES / "Qwen-Qwen3-0.6B.jinja"
    if not path.is_file():
        pytest.skip(f"real chat templates are not at {TEMPLATES}")
    template = ChatTemplate(path.read_text("utf-8"))
    assert "enable_thinking" in template.variables
    off = template.render(TALK, True, {"enable_thinking": False})
    assert off.endswith("<think>\n\n</think>\n\n")


HARMFUL = {
    "a long text": "{{ 'a' * 300000000 }}",
    "a long text the other way round": "{{ 300000000 * 'a' }}",
    "a wide field": "{{ 'a'.center(500000000) }}",
    "a wide filter": "{{ 'a' | center(500000000) }}",
    "a wide format": "{{ '%500000000d' % 1 }}",
    "a wide new format": "{{ '{:500000000}'.format(1) }}",
    "a wide format filter": "{{ '%500000000d' | format(1) }}",
    "a starred format": "{{ '%*d' % (500000000, 1) }}",
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "adding": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}"
    ),
    "replacing": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replacing by method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "joining": "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "joining long items": "{{ ''.join(['a' * 1000000] * 100000) }}",
    "joining long items by filter": "{{ (['a' * 1000000] * 100000) | join }}",
    "writing a list": "{{ ['a' * 1000000] * 100000 }}",
    "a list as text": "{{ (['a' * 1000000] * 100000) | string }}",
    "a list in a sum": "{{ 'a' ~ ['a' * 1000000] * 100000 }}",
    "a list as JSON": "{{ (['a' * 1000000] * 100000) | tojson }}",
    "wide JSON": "{{ [[[1]]] | tojson(indent=99999) }}",
    "a power": "{{ 9 ** 999999999 }}",
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "doubling recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "deep nesting": "{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}",
    "endless output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "no template": "{% for %}",
    "too much source": "a" * (MAX_SOURCE_BYTES + 1),
}


@pytest.mark.parametrize("source", HARMFUL.values(), ids=HARMFUL.keys())
def test_a_template_that_does_too_much_is_refused_when_it_is_loaded(source):
    started = time.perf_counter()
    with pytest.raises(ModelError):
        ChatTemplate(source)
    assert time.perf_counter() - started < 20


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ lipsum(100) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_reachable(source):
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source).render(TALK)
    assert caught.value.code == "invalid_messages"
    assert "<class" not in str(caught.value)
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("source", ["{{ joiner.__class__ }}", "{{ '{0.__class__}'.format(1) }}"])
def test_what_is_hidden_renders_as_nothing(source):
    assert ChatTemplate(source).render(TALK) == ""


def test_what_only_grows_with_the_messages_is_stopped_while_it_renders():
    template = ChatTemplate("{% for a in messages[0].content * 9 %}{{ a * 9999 }}{% endfor %}")
    with pytest.raises(InvalidRequestError, match="large") as caught:
        template.render([{"role": "user", "content": "a" * 10_000}])
    assert caught.value.param == "messages"


def test_a_template_may_refuse_messages_in_its_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        template.render(TALK)


def test_a_template_that_does_not_fit_the_messages_is_their_fault():
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate("{{ messages[0].content + 1 }}").render(TALK)
    assert caught.value.code == "invalid_messages"


@pytest.mark.parametrize("name", ["messages", "tokenize", "bos_token", "_private", "loop"])
def test_reserved_variables_cannot_be_set(name):
    with pytest.raises(InvalidRequestError, match="reserved"):
        ChatTemplate("{{ x }}").render(TALK, True, {name: 1})


def test_loops_keep_their_variables():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ' ' if not loop.last }}"
        "{% endfor %}{% for a, b in {'x': 1}.items() %}{{ a ~ b }}{% endfor %}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    assert ChatTemplate(source).render(TALK) == "1/4 2/4 3/4 4/4x101"


def test_json_is_written_as_models_were_trained_on_it():
    rendered = ChatTemplate("{{ messages | tojson }}").render([{"a": "<é>", "b": [1, None]}])
    assert rendered == '[{"a": "<é>", "b": [1, null]}]'
