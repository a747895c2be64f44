"""Lines as tables write them: a null is a field that is not there, and 16.0 is 16."""

import json

import pytest
from helpers.batch_files import DEFAULTS, chat_line
from hypothesis import given
from hypothesis import strategies as st
from twinmesh.engine.batch.plain_fields import without_nulls
from twinmesh.engine.batch.request_lines import BatchLineError, parse_line

USER = {"role": "user", "content": "a"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}


def read(fields):
    return parse_line(json.dumps(fields).encode(), 1, DEFAULTS)


def function(**parameters):
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}


@pytest.mark.parametrize(
    ("with_nulls", "bare"),
    [
        ({"prompt": "a", "logit_bias": {"5": 1, "7": None}}, {"prompt": "a", "logit_bias": {"5": 1}}),
        ({"prompt": "a", "response_format": {"type": "text", "json_schema": None}}, {"prompt": "a"}),
        ({"prompt": "a", "url": None, "tools": None, "suffix": None, "echo": None, "whatever": None}, {"prompt": "a"}),
        ({"prompt": None, "custom_id": None, "messages": [USER]}, {"messages": [USER]}),
        (
            {"messages": [{**USER, "name": None, "tool_calls": None, "tool_call_id": None}]},
            {"messages": [USER]},
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": None}]}]},
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}]}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        ),
        (
            {"messages": [USER], "tools": [function(properties={"a": {"type": "string"}, "b": None}, required=None)]},
            {"messages": [USER], "tools": [function(properties={"a": {"type": "string"}})]},
        ),
        (
            {"messages": [USER], "tools": [{**function(), "strict": None}], "tool_choice": None},
            {"messages": [USER], "tools": [function()]},
        ),
        (chat_line("a", prompt=None, stream=None, max_tokens=None, best_of=None), chat_line("a")),
        ({**chat_line("a"), "prompt": None, "messages": None, "temperature": None}, chat_line("a")),
        (
            {"prompt": "a", "max_tokens": 16.0, "n": 2.0, "top_k": 3.0},
            {"prompt": "a", "max_tokens": 16, "n": 2, "top_k": 3},
        ),
        ({"prompt": [5.0, 6.0], "stop_token_ids": [7.0]}, {"prompt": [5, 6], "stop_token_ids": [7]}),
        ({"prompt": [[5.0, 6]], "best_of": 1.0}, {"prompt": [5, 6]}),
    ],
    ids=str,
)
def test_a_line_of_a_table_is_the_request_without_its_nulls(with_nulls, bare):
    assert read(with_nulls) == read(bare)


@pytest.mark.parametrize(
    "tool",
    [
        function(properties={"a": {"type": "string", "default": None}}),
        function(properties={"a": {"const": None}, "b": {"enum": ["x", None]}}),
        function(properties={"a": {"default": {"b": None}}, "c": {"examples": [{"d": None}]}}),
        function(properties={"default": {"type": "string"}}, **{"$defs": {"const": {"default": None}}}),
        {"name": "f", "parameters": {"anyOf": [{"default": None}]}},
    ],
)
def test_a_null_that_is_a_value_of_a_schema_stays(tool):
    assert read({"messages": [USER], "tools": [tool]}).tools == [tool]


@pytest.mark.parametrize("arguments", [{"a": None}, {"a": {"b": None}}, {}, [None], '{"a": null}'])
def test_the_arguments_of_a_call_stay_as_they_are(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert read({"messages": messages}).messages == messages


@pytest.mark.parametrize("fields", [
    {"prompt": "a", "max_tokens": 16.5}, {"prompt": "a", "n": True}, {"prompt": [5.5]}, {"prompt": [None, 5]},
    {"prompt": "a", "max_tokens": float("inf")}, {"messages": [None, USER]},
])  # fmt: skip
def test_what_is_no_whole_number_or_no_field_is_still_refused(fields):
    with pytest.raises(BatchLineError, match=r"^line 1: "):
        read(fields)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
)


@given(json_values)
def test_no_field_is_null_afterwards_and_nothing_else_is_gone(value):
    def fields(value, path=()):
        if isinstance(value, dict):
            for name, inner in value.items():
                if inner is not None:
                    yield from fields(inner, (*path, name))
                    yield (*path, name)
        elif isinstance(value, list):
            yield (*path, len(value))
            for index, inner in enumerate(value):
                yield from fields(inner, (*path, index))
        else:
            yield (*path, value)

    plain = without_nulls(value)
    assert list(fields(plain)) == list(fields(value))
    assert without_nulls(plain) == plain
