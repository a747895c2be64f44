"""Values of messages that are no plain JSON: members of enumerations, and what is nested too deeply."""

import enum
import json

import numpy as np
import pytest
from twinmesh.models.errors import ChatTemplateError
from twinmesh.models.text.chat import ChatTemplate
from twinmesh.models.text.chat_messages import plain


class Role(str, enum.Enum):  # noqa: UP042 (`str` of it is its name)
    USER = "user"


class Kind(enum.StrEnum):
    TEXT = "text"


class Level(enum.IntEnum):
    HIGH = 3


class Share(float, enum.Enum):
    HALF = 0.5


class Name(str):
    def __str__(self):
        return "another"


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (Role.USER, "user"),
        (Kind.TEXT, "text"),
        (Level.HIGH, 3),
        (Share.HALF, 0.5),
        (Name("f"), "f"),
        (np.str_("x"), "x"),
        (np.float64(0.25), 0.25),
        ({Role.USER: [Kind.TEXT, (Level.HIGH,)]}, {"user": ["text", [3]]}),
    ],
)
def test_a_value_of_a_subclass_is_what_json_would_write(given, right):
    got = plain(given, "x")
    assert json.dumps(got) == json.dumps(right)
    assert type(got) is type(right)


def test_roles_and_types_may_be_members_of_enumerations(tiny):
    chat = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", tiny.tokenizer(), name="T")
    parts = [{"type": Kind.TEXT, "text": Name("hi")}]
    for content in ("hi", Name("hi"), parts):
        assert chat.render([{"role": Role.USER, "content": content}]) == "<user>hi"


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def endless():
    value = {}
    value["again"] = value
    return value


DEEP = {
    "content": lambda value: ([{"role": "user", "content": value}], {}),
    "a part": lambda value: ([{"role": "user", "content": [{"type": "text", "text": "a", "x": value}]}], {}),
    "arguments": lambda value: ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": value}}]}], {}),
    "a field": lambda value: ([{"role": "user", "content": "a", "x": value}], {}),
    "tools": lambda value: ([{"role": "user", "content": "a"}], {"tools": [{"x": value}]}),
    "variables": lambda value: ([{"role": "user", "content": "a"}], {"chat_template_kwargs": {"x": value}}),
}


@pytest.mark.parametrize("place", DEEP)
@pytest.mark.parametrize(
    "value", [nested(150), nested(900), nested(20_000), endless()], ids=["150", "900", "20000", "endless"]
)
def test_what_is_nested_too_deeply_is_refused_by_its_place(tiny, place, value):
    text = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}{{ tools }}{{ x }}"
    messages, options = DEEP[place](value)
    says = r"^(Message 0|Tool 0|chat_template_kwargs) is nested too deeply: 100 levels are the most\.$"
    with pytest.raises(ChatTemplateError, match=says):
        ChatTemplate(text, tiny.tokenizer(), name="T").render(messages, **options)


@pytest.mark.parametrize("depth", [120, 700, 3000, 100_000])
def test_arguments_in_text_are_bounded_alike(tiny, depth):
    text = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    chat = ChatTemplate(text, tiny.tokenizer(), name="T")
    for arguments in ('{"x": ' + "[" * depth + "]" * depth + "}", '{"x": ' * depth + "1" + "}" * depth):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(ChatTemplateError, match=r"Message 0, tool call 0, of 'f',.* (nested too deeply|not JSON)"):
            chat.render([{"role": "assistant", "content": None, "tool_calls": [call]}])


def test_schemas_as_deep_as_people_write_them_are_taken(tiny):
    schema = {"type": "string"}
    for _ in range(15):
        schema = {"type": "object", "properties": {"x": {"anyOf": [schema, {"type": "null"}]}}}
    chat = ChatTemplate("{{ messages[0].content }}{{ tools | tojson }}", tiny.tokenizer(), name="T")
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert json.loads(chat.render([{"role": "user", "content": ""}], tools=[tool])) == [tool]
