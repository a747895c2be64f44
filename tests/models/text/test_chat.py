"""Chat templates: rendering, ids, and what is refused."""

import pytest
from helpers.tiny_gguf import write_tiny_gguf
from twinmesh.models.checkpoints.open import open_checkpoint
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate

HELLO = [{"role": "user", "content": "hi"}]


def template(tiny, source):
    return ChatTemplate(source, tiny.tokenizer(), name="Tiny")


def test_the_file_s_template_renders(tiny):
    chat = tiny.chat_template()
    assert chat.render(HELLO) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_special_tokens_become_ids_and_bos_is_not_doubled(tmp_path):
    path = write_tiny_gguf(tmp_path / "bos.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    ids = open_checkpoint(path).chat_template().encode(HELLO)
    assert ids[0] == 1
    assert ids.count(1) == 2  # one per turn
    assert ids.count(2) == 1


def test_blocks_are_trimmed_and_extras_exist(tiny):
    source = "{% if true %}\n  {{ messages | tojson }}\n{% endif %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    assert template(tiny, source).render([{"role": "user", "content": "<é>"}]) == (
        '  [{"role": "user", "content": "<é>"}]\n4<|im_end|>'
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "Tiny has no chat template"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed: roles must alternate."),
        ("{{ raise_exception('user/assistant/user/...') }}", "failed: user/assistant/user/..."),
        ("{{ raise_exception('one call at once!') }}", "failed: one call at once!"),
        ("{{ raise_exception('') }}", "failed: RefusedByTemplate."),
        ("{% for %}", "failed"),
        ("{{ messages[0].content.nothing() }}", "failed"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "failed"),
        ("{{ [] | unknown_filter }}", "unknown_filter"),
        ("{{ messages[0].update({'a': 1}) }}", "failed"),
        ("{{ cycler.__init__.__globals__ }}", "failed"),
    ],
)
def test_templates_fail_in_one_sentence(tiny, source, says):
    with pytest.raises(ChatTemplateError, match="Tiny") as caught:
        template(tiny, source).render(HELLO)
    assert says in str(caught.value)
    assert not str(caught.value).endswith(("!.", "?."))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ({"role": "user", "content": "hi"}, "non-empty list"),
        ([*HELLO, "hi"], "Message 1 is of type str"),
        ([{"role": "user"}], "Message 0 needs a string under 'content'"),
        ([{"role": "user", "content": None}], "Message 0 needs a string under 'content'"),
        ([{"role": None, "content": "hi"}], "under 'role'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0 has a part under 'content'"),
        ([{"role": "user", "content": ["hi"]}], "Message 0 has a part under 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "of type 'image_url': only text is supported"),
        ([{"role": "assistant", "tool_calls": "f()"}], "'tool_calls' that are not a list"),
        ([{"role": "assistant", "tool_calls": ["f()"]}], "'tool_calls' that are not a list"),
        ([*HELLO, {"role": "user", "content": "hi", "at": object()}], "Message 1 holds a value of type object"),
    ],
)
def test_other_forms_of_messages_are_refused(tiny, messages, says):
    with pytest.raises(ChatTemplateError, match=says):
        tiny.chat_template().render(messages)


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([len], "Tool 0 is a Python function: give the JSON schema"),
        ([{}, "f"], "Tool 1 is of type str"),
        ({"type": "function"}, "must be a list of JSON schemas"),
        ([{"a": {1, 2}}], "Tool 0 holds a value of type set"),
    ],
)
def test_other_forms_of_tools_are_refused(tiny, tools, says):
    with pytest.raises(ChatTemplateError, match=says):
        tiny.chat_template().render(HELLO, tools=tools)


def test_tools_and_whatever_is_in_a_message_go_to_the_template(tiny):
    source = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}:"
        "{{ m.tool_calls[0].function.name if m.tool_calls else m.extra }};{% endfor %}"
        "{{ tools | tojson }}{{ unk_token }}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    messages = [{"role": "user", "content": "x", "extra": 1.5}, call]
    tools = ({"name": "é", "strict": True},)
    text = template(tiny, source).render(messages, tools=tools)
    assert text == 'user:x:1.5;assistant::f;[{"name": "é", "strict": true}]'
    assert template(tiny, "{{ tools is none }}").render(HELLO) == "True"
    assert template(tiny, "{{ tools is none }}").render(HELLO, tools=[]) == "True"


def test_special_tokens_that_the_model_lacks_are_not_defined(tiny):
    """As in transformers, whose templates ask "pad_token is defined"."""
    special = "{{ bos_token }}{{ bos_token is defined }}{{ eos_token is defined }}"
    rest = "{{ pad_token is defined }}{{ unk_token is defined }}{{ pad_token }}"
    assert template(tiny, special + rest).render(HELLO) == "<|im_start|>TrueTrueFalseFalse"
    with pytest.raises(ChatTemplateError, match="'pad_token' is undefined"):
        template(tiny, "{{ pad_token + 'x' }}").render(HELLO)


def test_json_is_written_as_templates_ask_for_it(tiny):
    source = "{{ tools | tojson }} {{ tools[0] | tojson(separators=(',', ':'), sort_keys=True, ensure_ascii=True) }}"
    text = template(tiny, source + "{{ tools[0] | tojson(indent=2) }}").render(HELLO, tools=[{"b": "é", "a": 1}])
    assert text == '[{"b": "é", "a": 1}] {"a":1,"b":"\\u00e9"}{\n  "b": "é",\n  "a": 1\n}'


def test_generation_blocks_and_loop_controls_leave_no_trace(tiny):
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}no{% endfor %}"
    assert template(tiny, source).render(HELLO) == "hi"


def test_tools_choose_the_template_of_that_name(tiny):
    named = {"default": "plain", "tool_use": "tools"}
    for source in (named, [{"name": name, "template": text} for name, text in named.items()]):
        chat = template(tiny, source)
        assert [chat.render(HELLO), chat.render(HELLO, tools=[{}])] == ["plain", "tools"]
    with pytest.raises(ChatTemplateError, match="of Tiny takes no tools"):
        template(tiny, {"default": "plain"}).render(HELLO, tools=[{}])
    with pytest.raises(ChatTemplateError, match="no chat template 'default', only 'rag'"):
        template(tiny, {"rag": "x"}).render(HELLO)


def test_a_file_without_a_template_opens_and_refuses_to_chat(tmp_path):
    path = write_tiny_gguf(tmp_path / "plain.gguf", metadata={"tokenizer.chat_template": None})
    chat = open_checkpoint(path).chat_template()
    with pytest.raises(ChatTemplateError, match="Tiny Llama has no chat template"):
        chat.encode(HELLO)
