"""What a caller sets of a chat template besides messages and tools: variables, another template, an open end."""

import json

import pytest
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate

HELLO = [{"role": "user", "content": "hi"}]
CHAT = [*HELLO, {"role": "assistant", "content": "It is"}]
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)


@pytest.fixture
def qwen3(tiny, fixtures):
    text = json.loads((fixtures / "chat_qwen3.json").read_text())["template"]
    return ChatTemplate(text, tiny.tokenizer(), name="Qwen3")


@pytest.fixture
def turns(tiny):
    return ChatTemplate({"default": TURNS, "short": "{{ messages[0].content }}"}, tiny.tokenizer(), name="Tiny")


def test_qwen3_s_thinking_can_be_switched_off(qwen3):
    opened = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for kwargs in (None, {}, {"enable_thinking": True}, {"enable_thinking": None}):
        assert qwen3.render(HELLO, chat_template_kwargs=kwargs) == opened
    off = qwen3.render(HELLO, chat_template_kwargs={"enable_thinking": False})
    assert off == opened + "<think>\n\n</think>\n\n"


def test_variables_are_plain_json_and_may_name_special_tokens(turns):
    source = "{{ bos_token }}{{ at | tojson }}{{ documents }}"
    given = {"bos_token": "<s>", "at": {"x": (1, 2)}, "documents": [{"title": "t"}]}
    text = turns.render(HELLO, chat_template=source, chat_template_kwargs=given)
    assert text == "<s>{\"x\": [1, 2]}[{'title': 't'}]"
    with pytest.raises(ChatTemplateError, match="chat_template_kwargs holds a value of type set"):
        turns.render(HELLO, chat_template=source, chat_template_kwargs={"at": {1}})


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"enable_thinkin": False}, r"of Qwen3 does not read 'enable_thinkin' .*: it reads 'enable_thinking'\."),
        ({"raise_exception": "x"}, "does not read 'raise_exception'"),
        ({"message": "x"}, "does not read 'message'"),
        ({"messages": []}, "'messages', which is an argument of its own"),
        ({"tools": []}, "'tools', which is an argument of its own"),
        ({"add_generation_prompt": False}, "'add_generation_prompt', which is an argument of its own"),
        ({"continue_final_message": True}, "'continue_final_message', which is an argument of its own"),
        ({"chat_template": "x"}, "'chat_template', which is an argument of its own"),
        ([("enable_thinking", False)], "chat_template_kwargs is of type list, expected a dict"),
        ("{}", "chat_template_kwargs is of type str, expected a dict"),
    ],
)
def test_variables_that_the_template_would_not_look_at_are_refused(qwen3, kwargs, says):
    with pytest.raises(ChatTemplateError, match=says):
        qwen3.render(HELLO, chat_template_kwargs=kwargs)


def test_variables_that_a_template_sets_where_they_are_missing_can_be_given(turns):
    """Llama 3.1's date_string; a name that is set in one branch may be read behind it."""
    asks = "{% if not day is defined %}{% set day = 'Monday' %}{% endif %}{{ day }}"
    defaults = "{% set day = day | default('Monday') %}{{ day }}"
    branch = "{% if messages | length > 1 %}{% set day = 'Monday' %}{% endif %}{{ day }}"
    for source in (asks, defaults, branch):
        assert turns.render(HELLO, chat_template=source, chat_template_kwargs={"day": "Friday"}) == "Friday"
    with pytest.raises(ChatTemplateError, match="it reads 'day'"):
        turns.render(HELLO, chat_template=asks, chat_template_kwargs={"date": "Friday"})


def test_another_template_is_a_text_or_one_of_the_model_s_by_name(turns):
    assert turns.render(HELLO, chat_template="{{ messages[0].content }}!") == "hi!"
    assert turns.render(HELLO, chat_template="short") == "hi"
    assert turns.render(HELLO, chat_template=None) == turns.render(HELLO)
    for name in ("shrt", "", "chat.jinja"):
        with pytest.raises(ChatTemplateError, match=rf"chat_template='{name}' is neither .* \('default', 'short'\)"):
            turns.render(HELLO, chat_template=name)
    with pytest.raises(ChatTemplateError, match="chat_template is of type int"):
        turns.render(HELLO, chat_template=3)
    for broken in ("{% for %}", "{{ 1 / 0 }}"):
        with pytest.raises(ChatTemplateError, match=r"^The chat_template that was given failed: "):
            turns.render(HELLO, chat_template=broken)
    with pytest.raises(ChatTemplateError, match=r"^The chat_template that was given takes no tools"):
        turns.render(HELLO, chat_template="{{ messages }}", tools=[{"name": "f"}])


def test_a_model_without_a_template_takes_one(tiny):
    bare = ChatTemplate(None, tiny.tokenizer(), name="Bare")
    assert bare.render(HELLO, chat_template="{{ messages[0].content }}!") == "hi!"


def test_many_templates_may_be_given(turns):
    for number in range(100):
        assert turns.render(HELLO, chat_template=f"{{{{ messages[0].content }}}}{number}") == f"hi{number}"


# ---- the last message, left open


def left_open(template, messages, **options):
    return template.render(messages, add_generation_prompt=False, continue_final_message=True, **options)


@pytest.mark.parametrize("said", ["It is", "It is ", " It is\n", "It is\n\n", "é", "</>", "It is CONTINUE"])
def test_a_message_that_is_continued_has_no_end(turns, qwen3, said):
    chat = [*HELLO, {"role": "assistant", "content": said}]
    assert left_open(turns, chat) == "<user>hi</><assistant>" + said
    parts = [{"type": "text", "text": "So:"}, {"type": "text", "text": said}]
    assert left_open(turns, [*HELLO, {"role": "assistant", "content": parts}]) == "<user>hi</><assistant>So:\n" + said


def test_where_the_template_trims_a_message_its_end_is_trimmed(turns):
    trims = TURNS.replace("m.content", "m.content | trim")
    chat = [*HELLO, {"role": "assistant", "content": " It is\n"}]
    assert left_open(turns, chat, chat_template=trims) == "<user>hi</><assistant>It is"


def test_any_message_may_be_continued_and_parts_are_where_templates_take_them(turns):
    assert left_open(turns, HELLO) == "<user>hi"
    takes_parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert left_open(turns, CHAT, chat_template=takes_parts) == "[hi][It is"


def test_a_message_cannot_be_continued_and_the_next_one_begun(turns):
    for options in ({}, {"add_generation_prompt": True}):
        with pytest.raises(ChatTemplateError, match=r"exclude each other.* Set add_generation_prompt to False"):
            turns.render(CHAT, continue_final_message=True, **options)


@pytest.mark.parametrize(
    ("last", "template", "says"),
    [
        ({"role": "assistant", "content": ""}, TURNS, "has no content to continue"),
        ({"role": "assistant", "content": "x"}, "{{ messages[0].role }}", "has no content to continue"),
        ({"role": "assistant", "content": "x y"}, "{{ messages | map(attribute='content') | join | truncate(6, true, '') }}", "leaves out"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(turns, last, template, says):
    with pytest.raises(ChatTemplateError, match=says):
        left_open(turns, [*HELLO, last], chat_template=template)
